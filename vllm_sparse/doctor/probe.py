# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The program that imports what may break: ``python -P -m vllm_sparse.doctor.probe``."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from vllm_sparse.machine import probe

THOROUGH, MODEL = "--thorough", "--model"


def model_facts(name: str) -> dict[str, Any]:
    """What there is to say about a model."""
    from vllm_sparse.doctor.model import model_findings

    return {"findings": model_findings(name)}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument(THOROUGH, action="store_true")
    parser.add_argument(MODEL)
    options = parser.parse_args()
    stages = dict(probe.THOROUGH if options.thorough else probe.QUICK)
    if options.model:
        stages["model"] = partial(model_facts, options.model)
        for name in ("vllm", "plugin"):  # what takes longest comes last
            if name in stages:
                stages[name] = stages.pop(name)
    probe.main(stages)


if __name__ == "__main__":
    main()
