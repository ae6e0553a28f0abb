# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Triton kernels against their references, on the device at hand.

The interpreter that CI runs accepts more than a compiler, adds up in another order and knows no
races, so this is not a repetition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.stages import CheckFailedError
from benchmarks.ops import rocketkv, sparda

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from benchmarks.gpu.stages import Report


def check(
    report: Report,
    options: argparse.Namespace,
    cases: Iterable[tuple[Any, Any]] | None = None,
    *,
    graphs: bool = True,
) -> None:
    """Runs all cases.

    Args:
        report: Gets a row for each operation and case.
        options: For the device and the seed.
        cases: Modules of operations and sizes; all of them unless given.
        graphs: Also replay a captured step; needs PyTorch's caching allocator.

    Raises:
        CheckFailedError: Some kernel differs from its reference.
    """
    device = torch.device(options.device)
    if options.tiny or cases is None:
        cases = cases_of("TINY_CASES" if options.tiny else "CASES")
    generator = torch.Generator(device).manual_seed(options.seed)
    report.note(seed=options.seed, device=str(device), torch=torch.__version__)
    for ops, case in cases:
        for kernel, found, limit in ops.check(case, device, generator, graphs):
            report.add(case=case.name, kernel=kernel, error=found, limit=limit, ok=found <= limit)
        if device.type == "cuda":
            torch.cuda.synchronize()
    wrong = [f"{row['kernel']} ({row['case']})" for row in report.rows if not row["ok"]]
    if wrong:
        raise CheckFailedError(f"differ from the reference: {', '.join(wrong)}")


def cases_of(name: str) -> list[tuple[Any, Any]]:
    """``CASES``, ``SANITIZED`` or ``TINY_CASES`` of all operations, beside their module.

    The first of each comes before the second of any, in case time runs out.
    """
    found = [(ops, enumerate(getattr(ops, name))) for ops in (rocketkv, sparda)]
    every = [(number, ops, case) for ops, cases in found for number, case in cases]
    return [(ops, case) for _, ops, case in sorted(every, key=lambda entry: entry[0])]
