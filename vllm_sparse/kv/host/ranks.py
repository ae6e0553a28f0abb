# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which ranks take host memory here, told by vLLM's configuration before any is started."""

from __future__ import annotations

import copy
from typing import Any


def memory_is_others(parallel: Any) -> bool:
    """Whether what is free here says nothing: it is not, or not yet, the engines' to come.

    Of several API servers, each completes the configuration again beside engines that run. Ray
    chooses the hosts of ranks, and a front-end may have no engines on its own.
    """
    if getattr(parallel, "_api_process_count", 1) > 1 and parallel._api_process_rank >= 0:
        return True
    # The planner has neither.
    executor = getattr(parallel, "distributed_executor_backend", None)
    engines = getattr(parallel, "data_parallel_backend", None)
    return "ray" in (executor, engines) or not parallel.data_parallel_size_local


def ranks_of_an_engine(parallel: Any) -> int:
    """Ranks of one engine, on all hosts."""
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)


def stages_here(parallel: Any) -> list[int]:
    """The stage of the pipeline of each rank on this host, of all its engines.

    Where none is here, those of one engine: something must be told of its pool.
    """
    first, count = 0, ranks_of_an_engine(parallel)
    engines = max(parallel.data_parallel_size_local, 1)
    if getattr(parallel, "nnodes", 1) > 1 and parallel.data_parallel_size_local:
        count = parallel.local_world_size
        first = parallel.node_rank_within_dp * count
    stages = [rank // parallel.tensor_parallel_size for rank in range(first, first + count)]
    return stages * engines


def layers_of_stages(config: Any) -> list[int]:
    """Layers of each stage of the pipeline; vLLM only tells a rank about its own."""
    parallel = copy.copy(config.parallel_config)
    counts = []
    for stage in range(parallel.pipeline_parallel_size):
        parallel.rank = stage * parallel.tensor_parallel_size
        counts.append(config.model_config.get_num_layers(parallel))
    return counts
