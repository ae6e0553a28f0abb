# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How long a decode step takes at least, and from which context on sparse is shorter than dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.planner import bounds
from vllm_sparse.planner.devices import DENSE_LAUNCHES, POLICY_LAUNCHES, SPARDA_LAUNCHES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.planner.plan import Question
    from vllm_sparse.planner.shapes import Shape
    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.policies.sparda import SpardaSettings

DENSE = "dense"
MISSES = 0.25
"""Of SPARDA's free picks: those that the step before had not chosen.

Measured were 0.16 to 0.31 with 16 blocks of a small model and 0.10 to 0.23 with 32, never with the
default of 96 (``benchmarks.blocks``). A slab that holds more than a step's blocks fetches fewer.
"""

_STEP = 1024
_FURTHEST = 1 << 20


def dense_ms(question: Question, context: int) -> float:
    """A decode step of stock vLLM."""
    shape = _of_rank(question)
    read = bounds.step_bytes(shape, question.concurrency, context)
    return _milliseconds(question, read, DENSE_LAUNCHES)


def policy_ms(question: Question, policy: Policy, context: int) -> float:
    """A decode step of a policy."""
    if not policy.retention(context).sparse:
        return dense_ms(question, context)
    shape, rows = _of_rank(question), question.concurrency
    split = bounds.split_by(policy, context)
    skipped = min(policy.settings.skip_layers, shape.kv_layers)
    read = bounds.step_bytes(shape, rows, context, split)
    read += skipped * bounds.layer_bytes(shape, rows, context, split._replace(stage2=False))
    read -= skipped * bounds.layer_bytes(shape, rows, context, split)
    return _milliseconds(question, read, POLICY_LAUNCHES)


def sparda_ms(
    question: Question, settings: SpardaSettings, context: int, hosted_layers: int
) -> float:
    """A decode step of SPARDA, in which a share of the free picks is fetched.

    On a CPU that is a copy within the memory that attention reads from: in and out, at no other
    time.

    Args:
        question: What is asked.
        settings: SPARDA's.
        context: Tokens of a prompt.
        hosted_layers: Those that fetch: the others' blocks all have frames.
    """
    shape, rows, size = _of_rank(question), question.concurrency, settings.block_size
    there = -(-context // size)
    read = there if context <= settings.dense_len else min(settings.blocks_read, there)
    free = max(read - settings.init_blocks - settings.local_blocks - 1, 0)
    if context <= settings.dense_len or settings.resident:
        free = 0
    fetched = MISSES * free * rows * shape.kv_bytes_per_token * size * hosted_layers / shape.layers
    moved = fetched if question.on_gpu else 2 * fetched
    step = bounds.paged_step(
        shape, rows, context, (read, size, settings.kernel_stride), moved,
        question.device.bytes_per_s, question.device.link_bytes_per_s,
    )  # fmt: skip
    ahead = question.on_gpu and settings.prefetch and settings.chosen_selector != "query"
    launches = SPARDA_LAUNCHES * shape.layers * question.device.launch_us / 1e3
    return (step.prefetched_ms if ahead else step.blocking_ms) + launches


def wins_from(question: Question, milliseconds: Callable[[int], float]) -> int | None:
    """The first multiple of 1,024 prompt tokens whose step is shorter than dense; or none.

    Args:
        question: For dense steps, and how far the model reaches.
        milliseconds: The other side's step at a number of prompt tokens.
    """
    furthest = question.model.furthest or _FURTHEST
    for context in range(_STEP, furthest + 1, _STEP):
        if milliseconds(context) < dense_ms(question, context):
            return context
    return None


def _of_rank(question: Question) -> Shape:
    return question.model.shape().of_rank(question.ranks)


def _milliseconds(question: Question, read: float, launches: int) -> float:
    device, layers = question.device, question.model.layers
    return 1e3 * read / device.bytes_per_s + launches * layers * device.launch_us / 1e3
