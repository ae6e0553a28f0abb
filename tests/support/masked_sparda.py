# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Engines with SPARDA, and their tokens against Hugging Face under the mask of blocks."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from reference import hf_sparda

from support.engine import SPARDA_SELECTION, SPARDA_SETTINGS, run_engine

if TYPE_CHECKING:
    from pathlib import Path

_OTHER_SETTINGS = {
    "forecast",
    "prompt_selector",
    "kernels",
    "prefetch",
    "resident",
    "resident_first_layer",
}


def run_sparda(model: Path, prompts: list[list[int]], /, **changes: Any) -> dict[str, Any]:
    """Run with some settings or some arguments of :func:`run_engine` changed."""
    settings = {k: v for k, v in changes.items() if k in SPARDA_SETTINGS or k in _OTHER_SETTINGS}
    arguments = {k: v for k, v in changes.items() if k not in settings}
    if settings.get("resident"):
        settings["slab_gib"] = None
    return run_engine(
        model,
        prompts,
        settings={**SPARDA_SETTINGS, **settings},
        backend="sparda",
        **{"max_num_seqs": 6, **arguments},
    )


@cache
def hf_model(path: Path):
    """A checkpoint in Hugging Face's library."""
    return hf_sparda.load_model(path)


def assert_tokens_of_hugging_face(
    model: Path, prompts, tokens, forecast=None, stored=None, **changes
) -> None:
    """Every request's tokens equal the masked Hugging Face run's, up to genuine near-ties."""
    agreed = 0
    for prompt, got in zip(prompts, tokens, strict=True):
        expected = hf_sparda.generate(
            hf_model(model), prompt, len(got), forecast=forecast, stored=stored,
            **{**SPARDA_SELECTION, **changes},
        )  # fmt: skip
        same = [a == b for a, b in zip(got, expected.tokens, strict=True)]
        first = same.index(False) if False in same else len(same)
        agreed += first
        if first < len(same):
            margin, gap = expected.margins[first], min(expected.gaps[: first + 1])
            assert margin < 3e-4 or gap < 1e-5, f"diverges at {first}: {margin}, {gap}"
    assert agreed > 0.9 * sum(map(len, tokens)), "near-ties may excuse few tokens only"
