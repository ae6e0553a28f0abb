# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What happens once vLLM's configuration is complete: refusals, and the size of SPARDA's cache."""

from __future__ import annotations

import logging
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from vllm_sparse.backends.asked import cache_itemsize, cache_kind, has_layers
from vllm_sparse.backends.prefix_tier import prepare_tier
from vllm_sparse.backends.refusals import unsupported
from vllm_sparse.config import NAMESPACE, load_settings
from vllm_sparse.device_room import least_weight_bytes, left_bytes
from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.forecast.routing import route_model
from vllm_sparse.instance import instance_of
from vllm_sparse.kv.host.geometry import (
    GIB,
    block_bytes,
    blocks_of_one,
    compressed_bytes,
    fit_slab,
    gib_of,
    held_gib,
    host_blocks,
    plan_frames,
    staging_pieces,
)
from vllm_sparse.kv.host.memory import available_bytes
from vllm_sparse.kv.host.ranks import (
    layers_of_stages,
    memory_is_others,
    ranks_of_an_engine,
    stages_here,
)
from vllm_sparse.registry import entries, is_ours, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.policies.sparda import SpardaSettings

# A child of vLLM's logger: others have no handler in its processes.
logger = logging.getLogger("vllm.sparse.sparda")

_HOST_POOL = "the host pool"
_QUERIES, _STAGING = "the queries that selector=previous keeps", "staging"
_FRAMES = "frames and compressed keys"


def check_config(vllm_config: Any, device_bytes: Callable[[], int] | None = None) -> None:
    """Refuse unsupported configurations if one of our backends is chosen; prepare it.

    vLLM calls this several times for one configuration, in an engine even when it has started.

    Args:
        vllm_config: vLLM's complete configuration.
        device_bytes: Tells the memory of a device; ``None`` where host and device are one.

    Raises:
        ConfigError: The settings are wrong.
        UnsupportedError: The backend cannot serve this configuration; lists every reason.
    """
    attention = vllm_config.attention_config
    # One that serves a kind of layers only is refused as the others are.
    named = (attention.backend, *attention.backend_per_kind.values())
    backend = next(filter(is_ours, named), None)
    if backend is None or vllm_config.model_config is None:
        return
    settings = load_settings(vllm_config.additional_config, backend.name.lower())
    entry = entries()[backend.name]
    on_gpu = device_bytes is not None or settings.kernels == "triton"
    reasons = unsupported(vllm_config, backend.name, on_gpu)
    if reasons:
        raise UnsupportedError(
            f"{backend.name} cannot serve this configuration: " + "; ".join(reasons)
        )
    instance_of(vllm_config)  # named here, for all processes
    prepare_tier(vllm_config)
    prepare_drafter(vllm_config)
    if entry.prepare:
        load(entry.prepare)(vllm_config, settings, device_bytes)


def prepare_drafter(vllm_config: Any) -> None:
    """Have the layers of a drafter served by the model's backend; vLLM would take a stock one.

    Raises:
        ConfigError: Somebody chose another.
    """
    drafts, backend = vllm_config.speculative_config, vllm_config.attention_config.backend
    if not has_layers(drafts):
        return
    if drafts.attention_backend not in (None, backend):
        raise ConfigError(
            f"--speculative-config: attention_backend {drafts.attention_backend.name} beside "
            f"{backend.name}: the drafter's layers share blocks with the model's; leave it out"
        )
    drafts.attention_backend = backend


def prepare_sparda(
    config: Any, settings: SpardaSettings, device_bytes: Callable[[], int] | None
) -> None:
    """Make vLLM manage the blocks of the host pool, and build a model that can look ahead.

    Args:
        config: vLLM's, whose block size, number of blocks and model class are set, and where the
            settings leave it open, the slab and most requests at once.
        settings: SPARDA's.
        device_bytes: Tells the memory of a device; ``None`` where host and device are one.

    Raises:
        ConfigError: The pool or the slab cannot work, or the Forecast is not this model's.
        UnsupportedError: The chosen selector cannot look into this model.
    """
    instance, cache = instance_of(config), config.cache_config
    # Later, what was sized is taken, and would count as memory that others have.
    if instance.sized_blocks is None or instance.sized_blocks != cache.num_gpu_blocks_override:
        size_sparda(config, settings, device_bytes, available_bytes())
        instance.sized_blocks = cache.num_gpu_blocks_override
    route_model(config)


def size_sparda(
    config: Any,
    settings: SpardaSettings,
    device_bytes: Callable[[], int] | None,
    available: int,
) -> tuple[int, ...]:
    """Size the host pool and the slab.

    Args:
        config: vLLM's, whose block size and number of blocks are set, and where the settings leave
            it open, the slab and most requests at once.
        settings: SPARDA's.
        device_bytes: Tells the memory of a device; ``None`` where host and device are one.
        available: Host memory that is free, in bytes.

    Returns:
        Frames of each layer.

    Raises:
        ConfigError: The pool or the slab cannot work.
    """
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    if cache.user_specified_block_size and cache.block_size != settings.block_size:
        raise ConfigError(
            f"--block-size {cache.block_size} contradicts vllm_sparse.block_size="
            f"{settings.block_size}; leave one of them out or make them equal"
        )
    # Else vLLM would ask the backend for another one once the model is loaded: 0.32 on GPUs, 0.33
    # on CPUs too.
    cache.block_size, cache.user_specified_block_size = settings.block_size, True
    stages, kv_heads = layers_of_stages(config), model.get_num_kv_heads(parallel)
    layers = max(stages)
    itemsize = cache_itemsize(cache_kind(config), model.dtype.itemsize)
    shape = settings.block_size, model.get_head_size(), itemsize
    bytes_per_block = block_bytes(layers, kv_heads, *shape)
    ranks = stages_here(parallel)
    layers_here = sum(stages[stage] for stage in ranks)
    pools = layers_here / layers  # those of the longest stages
    piece_bytes = bytes_per_block // (layers * kv_heads)
    staging = staging_pieces(settings, kv_heads) * piece_bytes
    query_bytes = 0  # of a block in host memory, in the model's dtype
    if settings.chosen_selector == "previous":
        query_bytes = layers * model.get_num_attention_heads(parallel) * model.get_head_size()
        query_bytes *= model.dtype.itemsize
    room = 0  # of a device, for frames and compressed keys
    if device_bytes is not None and settings.slab_gib is None:
        room = left_bytes(config, device_bytes()) - staging
    if "host_gib" not in settings.model_fields_set:
        held = held_gib(settings, room, bytes_per_block, itemsize)
        each, share = (bytes_per_block, query_bytes), int(available / pools)
        settings = _choose_pool(config, settings, each, share, held)
    blocks = host_blocks(settings, bytes_per_block, model.max_model_len)
    if cache.num_gpu_blocks_override is None:
        cache.num_gpu_blocks_override = blocks
    elif cache.num_gpu_blocks_override > blocks:
        raise ConfigError(
            f"--num-gpu-blocks-override {cache.num_gpu_blocks_override} needs more host memory than"
            f" vllm_sparse.host_gib={settings.host_gib}, which holds {blocks} blocks"
        )
    blocks = cache.num_gpu_blocks_override
    sizes = {
        "num_layers": layers,
        "num_pieces": blocks * kv_heads,
        "num_kv_heads": kv_heads,
        "piece_bytes": piece_bytes,
        "max_model_len": model.max_model_len,
    }
    compressed = compressed_bytes(settings, blocks, bytes_per_block, itemsize)
    # What is in host memory; each is of all ranks of this host together.
    taken = {_HOST_POOL: blocks * block_bytes(layers_here, kv_heads, *shape)}
    if query_bytes:
        taken[_QUERIES] = blocks * query_bytes * layers_here // layers
    if device_bytes is not None and settings.slab_gib is None and not settings.resident:
        settings = _choose_slab(config, settings, room - compressed, sizes)
    if device_bytes is None:  # one memory holds everything, also what is filled only later
        taken |= {
            _STAGING: staging * len(ranks),
            "weights": least_weight_bytes(model) * len(ranks) // ranks_of_an_engine(parallel),
        }
        room = int((available - sum(taken.values())) / pools) - compressed
        # Of several hosts each would admit another number, and the scheduler hears of one.
        alone = getattr(parallel, "nnodes", 1) == 1
        if settings.slab_gib is None and alone and not memory_is_others(parallel):
            _admit_what_fits(config, settings, room, sizes)
    seqs = config.scheduler_config.max_num_seqs
    frames = plan_frames(settings, max_num_seqs=seqs, **sizes)
    if device_bytes is None:
        each = sum(frames) * piece_bytes + compressed
        taken[_FRAMES] = each * layers_here // layers
    else:  # whose layers have no host blocks if all of them are on the device
        hosted = sum(count < sizes["num_pieces"] for count in frames)
        taken[_HOST_POOL] = taken[_HOST_POOL] * hosted // layers
    _check_memory(config, settings, taken, available)
    return frames


def _check_memory(
    config: Any, settings: SpardaSettings, taken: dict[str, int], available: int
) -> None:
    """Compare what all ranks here will take of host memory with what there is, before they do.

    Args:
        config: vLLM's, for the ranks that are on this host.
        settings: SPARDA's.
        taken: Bytes of each part, in words.
        available: Host memory that is free, in bytes.

    Raises:
        ConfigError: It is too little; says how much each part takes.
    """
    if memory_is_others(config.parallel_config):
        return
    total = sum(taken.values())
    if total <= available:
        return
    parts = ", ".join(f"{name} {nbytes / GIB:.2f} GiB" for name, nbytes in taken.items())
    ranks = len(stages_here(config.parallel_config))
    lower = ["host_gib"]
    if _FRAMES in taken:
        if settings.slab_gib:
            lower += ["slab_gib", "--max-num-seqs"]
        else:  # they are those of one request, or of all blocks
            lower += ["set resident to false"] if settings.resident else ["top_k, or set slab_gib"]
    if max(taken, key=lambda name: taken[name]) == _STAGING:
        lower = ["staging_blocks"]
    raise ConfigError(
        f"vllm_sparse.host_gib: {parts}: together {total / GIB:.2f} GiB"
        f"{' on all ranks' if ranks > 1 else ''}, but this "
        f"machine has {available / GIB:.2f} GiB available. Lower {' or '.join(lower)}"
        f"{' or choose another selector' if _QUERIES in taken else ''}"
    )


def _choose_pool(
    config: Any, settings: SpardaSettings, each: tuple[int, int], available: int, held: float
) -> SpardaSettings:
    """Let the pool hold what the device does, and one long request if half of host memory can.

    Args:
        config: vLLM's; its settings are changed, so that every process knows.
        settings: SPARDA's, as they were set.
        each: Bytes of one block in all layers of a rank, and of the queries that are kept of it.
        available: A rank's share of the host memory that is free, in bytes.
        held: The largest pool of which the device holds every block, in GiB.

    Returns:
        The settings, with the pool if it is not the default.
    """
    longest = config.model_config.max_model_len
    one_blocks, (block, queries) = blocks_of_one(settings, longest), each
    needed, others = one_blocks * block, memory_is_others(config.parallel_config)
    why = "this device holds them; a larger host_gib keeps more, in host memory"
    if queries and not others:
        most = gib_of(max(available // (2 * queries), one_blocks) * block)
        if most < held:
            held, why = most, "half of what is free holds the queries that are kept beside them"
    too_much = 2 * needed > available and not others
    one = 0.0 if too_much or needed <= held * GIB else gib_of(needed)
    chosen = max(one, held)
    if chosen <= settings.host_gib:
        return settings
    _tell(config, host_gib=chosen)
    place = ""
    if chosen != held:
        place, why = " of host memory", f"one request of --max-model-len {longest} needs them"
    logger.info(
        f"SPARDA: {chosen:.2f} GiB{place} per rank for keys and values, as host_gib is not set "
        f"and {why}"
    )
    return settings.model_copy(update={"host_gib": chosen})


def _tell(config: Any, **chosen: float) -> None:
    """Changes the settings in vLLM's configuration, so that every process knows."""
    given = config.additional_config or {}
    config.additional_config = {**given, NAMESPACE: {**given.get(NAMESPACE, {}), **chosen}}


def _admit_what_fits(
    config: Any, settings: SpardaSettings, room: int, sizes: dict[str, int]
) -> None:
    """Admit fewer requests at once where frames for all that may come do not fit memory.

    Args:
        config: vLLM's; its scheduler's most requests at once are lowered.
        settings: SPARDA's, without a slab.
        room: Bytes of a rank for frames.
        sizes: Of :func:`plan_frames`.
    """
    scheduler = config.scheduler_config
    asked = scheduler.max_num_seqs

    def taken(requests: int) -> int:
        return sum(plan_frames(settings, max_num_seqs=requests, **sizes)) * sizes["piece_bytes"]

    served = bisect_right(range(1, asked + 1), room, key=taken)
    if served == asked:
        return
    _admit(scheduler, max(served, 1))
    if served:  # else the start stops, and says what one takes
        logger.info(
            "SPARDA: memory holds frames for %d requests at once beside the host pool "
            "(--max-num-seqs was %d); a lower host_gib, or a slab_gib, leaves room for more",
            served,
            asked,
        )


def _admit(scheduler: Any, requests: int) -> None:
    """Lower the most requests at once, of those that run and of those that may begin."""
    scheduler.max_num_seqs = requests
    active = getattr(scheduler, "max_num_active_seqs", None)  # the planner has none
    if active is not None:
        scheduler.max_num_active_seqs = min(active, requests)


def _choose_slab(
    config: Any, settings: SpardaSettings, room: int, sizes: dict[str, int]
) -> SpardaSettings:
    """Give frames what the model leaves, and admit as many requests as these serve.

    Args:
        config: vLLM's; its settings and its scheduler's are changed, so that every process knows.
        settings: SPARDA's, as they were set.
        room: Bytes of a device for frames.
        sizes: Of :func:`fit_slab`.

    Returns:
        The settings with the slab.
    """
    scheduler = config.scheduler_config
    asked = scheduler.max_num_seqs
    slab, served = fit_slab(settings, room_bytes=room, max_num_seqs=asked, **sizes)
    if served < asked:
        # A batch that is padded beyond this number would not run in a graph.
        captured = config.compilation_config.cudagraph_capture_sizes or ()
        served = max((size for size in captured if size <= served), default=served)
    _admit(scheduler, served)
    _tell(config, slab_gib=slab / GIB)
    logger.info(
        "SPARDA: %.2f GiB of this device for frames, as slab_gib is not set; they serve %d "
        "requests at once (--max-num-seqs was %d)",
        slab / GIB,
        scheduler.max_num_seqs,
        asked,
    )
    return settings.model_copy(update={"slab_gib": slab / GIB})
