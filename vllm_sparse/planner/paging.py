# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's host pool and frames, as start-up would size them for a question."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_sparse import startup
from vllm_sparse.config import NAMESPACE
from vllm_sparse.device_room import least_weight_bytes
from vllm_sparse.errors import VllmSparseError
from vllm_sparse.forecast.routing import tapped_architecture
from vllm_sparse.kv.host.geometry import blocks_per_row, gib_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.planner.plan import Question
    from vllm_sparse.policies.sparda import SpardaSettings

# More requests at once than any server is asked for, to learn how many a slab serves.
MANY = 4096


class Sized(NamedTuple):
    """What start-up chooses.

    Attributes:
        chosen: Settings that are to be said: the host pool, unless start-up takes it by itself.
        blocks: Of the host pool.
        frames: Of each layer.
        served: Most requests in a step.
        hosted_layers: Those that keep blocks in host memory.
    """

    chosen: dict[str, Any]
    blocks: int
    frames: tuple[int, ...]
    served: int
    hosted_layers: int


def sized(question: Question, settings: SpardaSettings, each: int) -> Sized:
    """The pool and the frames of a server for these requests.

    Args:
        question: What is asked.
        settings: SPARDA's.
        each: Bytes of a block.

    Raises:
        ConfigError: The pool or the frames cannot work.
    """
    chosen = dict(question.settings)
    if "host_gib" not in chosen:  # as much as these requests need, if there is as much
        most = _largest_pool(question, settings, each)
        held = -(-question.model.max_model_len // settings.block_size)
        wanted = min((question.concurrency * held + 1) * each, most)
        found = _unsaid(question, settings) if question.on_gpu else None
        if found is not None and found.blocks * each >= wanted:
            return found
        chosen["host_gib"] = gib_of(wanted)
        settings = settings.model_copy(update={"host_gib": chosen["host_gib"]})
    return _at_start(question, settings, chosen)


def _unsaid(question: Question, settings: SpardaSettings) -> Sized | None:
    """What start-up takes if nobody says ``host_gib``, if that takes no host memory for blocks."""
    try:
        found = _at_start(question, settings, dict(question.settings))
    except VllmSparseError:  # a larger pool may do
        return None
    return None if found.hosted_layers else found


def _at_start(question: Question, settings: SpardaSettings, chosen: dict[str, Any]) -> Sized:
    """What start-up makes of settings.

    Args:
        question: What is asked.
        settings: SPARDA's.
        chosen: Those of them that are said.

    Raises:
        ConfigError: The pool or the frames cannot work.
    """
    model = question.model
    config = question.configuration(MANY if question.on_gpu else question.concurrency)
    config.additional_config = {NAMESPACE: chosen}
    tapped_architecture(config)
    total: Callable[[], int] | None = (lambda: question.device_bytes) if question.on_gpu else None
    frames = startup.size_sparda(config, settings, total, question.host_bytes)
    blocks = config.cache_config.num_gpu_blocks_override
    pieces = blocks * model.get_num_kv_heads(config.parallel_config)
    # A GPU's layers have no host blocks if all of them have frames.
    hosted = sum(count < pieces for count in frames) if question.on_gpu else model.layers
    return Sized(chosen, blocks, frames, config.scheduler_config.max_num_seqs, hosted)


def hosted_layers_at(question: Question, settings: SpardaSettings, each: int, context: int) -> int:
    """Layers with blocks in host memory if prompts had another length.

    Args:
        question: What is asked.
        settings: SPARDA's.
        each: Bytes of a block.
        context: Tokens of a prompt. Where no server takes it, all layers count.
    """
    model = replace(question.model, max_model_len=context + question.output)
    try:
        longer = replace(question, model=model, context=context)
        return sized(longer, settings, each).hosted_layers
    except VllmSparseError:
        return model.layers


def _largest_pool(question: Question, settings: SpardaSettings, each: int) -> int:
    """Bytes of a rank's pool, some slack left; on a CPU beside weights and at most as many frames.

    Args:
        question: What is asked.
        settings: SPARDA's.
        each: Bytes of a block.
    """
    most = question.host_bytes * 8 // 10
    if question.on_gpu:
        return most // question.ranks
    left = max(most - least_weight_bytes(question.model), 0) // question.ranks
    read = question.concurrency * blocks_per_row(settings, question.model.max_model_len)
    return max(left // 2, left - 2 * read * each)
