# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Blocks, bytes, requests and steps of each backend for one model, context and device.

Sizes are those of start-up: the policies' own retention, the slab's and the pool's own arithmetic,
and the refusals, called with a model that only has its ``config.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_sparse.backends.refusals import unsupported
from vllm_sparse.config import NAMESPACE, load_settings
from vllm_sparse.device_room import left_bytes
from vllm_sparse.errors import VllmSparseError
from vllm_sparse.features import SPARDA
from vllm_sparse.kv.host.geometry import block_bytes, blocks_per_row
from vllm_sparse.planner import bounds, paging
from vllm_sparse.planner.times import DENSE, dense_ms, policy_ms, sparda_ms, wins_from
from vllm_sparse.policies.making import make_policy
from vllm_sparse.policies.protocol import Shape as CacheShape
from vllm_sparse.registry import entries

if TYPE_CHECKING:
    from vllm_sparse.planner.devices import Device
    from vllm_sparse.planner.model import Model
    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.policies.sparda import SpardaSettings

_KEPT = ("keeps and reads windows alone", "keeps and reads every token")
CPU_LEAVES_OUT = "choosing, bookkeeping and the wait for copies, which a CPU does itself"


@dataclass(frozen=True)
class Question:
    """What is to be served, on what.

    Attributes:
        model: The model, whose ``max_model_len`` is prompt and output together.
        name: As the user calls it.
        context: Tokens of a prompt.
        output: Tokens of an answer.
        concurrency: Requests at once.
        device: Its kind.
        device_bytes: Memory of one.
        host_bytes: Free host memory.
        ranks: Tensor-parallel ones.
        utilization: Share of a device's memory that vLLM may take.
        kv_bytes: The pool on a rank, if it is given: ``--kv-cache-memory-bytes``.
        block_size: Tokens per block, if they are given.
        settings: Of the chosen backend: ``vllm_sparse`` of ``--additional-config``.
    """

    model: Model
    name: str
    context: int
    output: int
    concurrency: int
    device: Device
    device_bytes: int
    host_bytes: int
    ranks: int = 1
    utilization: float = 0.92
    kv_bytes: int | None = None
    block_size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether device and host have memories of their own."""
        return self.device.launch_us > 0

    def blocks_of(self, name: str) -> int:
        """Tokens per block of a backend that does not set them itself."""
        default = self.device.block_size if name == DENSE else self.device.policy_block_size
        return self.block_size or default

    def configuration(self, seqs: int, name: str = DENSE) -> Any:
        """What vLLM's configuration would say, as far as start-up asks.

        Args:
            seqs: ``--max-num-seqs``.
            name: Of the backend.
        """
        return SimpleNamespace(
            model_config=self.model,
            cache_config=SimpleNamespace(
                cache_dtype="auto", kv_offloading_size=None, num_gpu_blocks_override=None,
                gpu_memory_utilization=self.utilization,
                user_specified_block_size=self.block_size is not None,
                block_size=self.blocks_of(name), sliding_window=self.model.window_of_all,
            ),
            parallel_config=SimpleNamespace(
                decode_context_parallel_size=1, prefill_context_parallel_size=1,
                pipeline_parallel_size=1, tensor_parallel_size=self.ranks,
                data_parallel_size_local=1, use_ubatching=False,
            ),
            scheduler_config=SimpleNamespace(
                max_num_seqs=seqs, max_num_batched_tokens=self.device.batched_tokens,
                disable_hybrid_kv_cache_manager=False,
            ),
            attention_config=SimpleNamespace(use_non_causal=False, backend_per_kind={}),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=None),
            speculative_config=None, kv_transfer_config=None, lora_config=None,
            use_v2_model_runner=self.on_gpu,  # vLLM's default
            additional_config={NAMESPACE: self.settings},
        )  # fmt: skip


@dataclass
class Arm:
    """One backend's answer; bytes are a rank's.

    Attributes:
        name: Of the backend, or ``dense``.
        refused: Why it cannot serve this; the rest is then empty.
        kept: What it does to a request of this length, in words.
        block_bytes: A block on the device, all layers.
        pool_blocks: Of the pool, vLLM's null block included; SPARDA: of the host pool.
        pool_bytes: On the device.
        prompt_blocks: Of a request while its prompt is read.
        request_blocks: Of a request with all its tokens.
        request_bytes: On the device: blocks; SPARDA: compressed keys and frames of a step, without
            the slab's others and staging, which requests share.
        request_host_bytes: In host memory.
        host_bytes: Of the host pool, all ranks.
        slab_bytes: Frames of all requests.
        fits: Requests that decode at once.
        step_ms: A decode step of ``concurrency`` requests.
        speedup: Against dense.
        wins_from: Prompt tokens from which a step is shorter than dense; ``None``: never.
        left_out: What the step takes beside that, in words.
        serve: The command.
    """

    name: str
    refused: list[str] = field(default_factory=list)
    kept: str = ""
    block_bytes: int = 0
    pool_blocks: int = 0
    pool_bytes: int = 0
    prompt_blocks: int = 0
    request_blocks: int = 0
    request_bytes: int = 0
    request_host_bytes: int = 0
    host_bytes: int = 0
    slab_bytes: int = 0
    fits: int = 0
    step_ms: float = 0.0
    speedup: float = 0.0
    wins_from: int | None = None
    left_out: str = ""
    serve: str = ""


def answer(question: Question, name: str) -> Arm:
    """What a backend makes of a question.

    Args:
        question: What is asked.
        name: Of the backend in capitals, or ``dense``.

    Raises:
        ConfigError: The settings are wrong.
    """
    if name == DENSE:
        refused = _impossible(question)
        return Arm(DENSE, refused) if refused else _dense(question)
    settings = load_settings({NAMESPACE: question.settings}, name.lower())
    config = question.configuration(question.concurrency, name)
    refused = [
        *unsupported(config, name, question.on_gpu),
        *question.model.layer_refusals(name, question.on_gpu, question.device.flash_attention),
        *_impossible(question),
    ]
    if refused:
        return Arm(name, refused)
    try:
        if entries()[name].family == SPARDA:
            return _sparda(question, name, settings)
        return _policy(question, name, settings)
    except VllmSparseError as error:
        return Arm(name, [str(error)])


def _impossible(question: Question) -> list[str]:
    """Why nobody could serve this."""
    model, reasons, ranks = question.model, [], question.ranks
    heads, kv_heads = int(model.text["num_attention_heads"]), model.get_total_num_kv_heads()
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        reasons.append(
            f"{heads} query heads and {kv_heads} KV heads cannot be divided among {ranks} ranks; "
            "choose a --tensor-parallel-size that divides the query heads, and that divides the KV "
            "heads or is a multiple of them"
        )
    if not (model.full_layers or model.windowed_layers):
        reasons.append(
            "none of its layers keeps keys and values, of which there is nothing to plan"
        )
    if 0 < model.furthest < model.max_model_len:
        asked = f"{question.context} + {question.output}"
        reasons.append(
            f"{asked} tokens are more than the {model.furthest} that the model was made for; lower "
            "--context, or plan a copy of its config.json with the rope_parameters (YaRN's, say) "
            "and the max_position_embeddings that you will serve it with (--hf-overrides)"
        )
    return reasons


def pool_room(question: Question) -> int:
    """Bytes of a rank's device for keys and values."""
    if question.kv_bytes is not None:
        return question.kv_bytes
    return max(left_bytes(question.configuration(question.concurrency), question.device_bytes), 0)


def _dense(question: Question) -> Arm:
    size, model = question.blocks_of(DENSE), question.model
    each = _block_bytes(question, size)
    blocks = pool_room(question) // each
    beside = _window_blocks(question, size)
    prompt, held = (
        (-(-tokens // size) if model.full_layers else 0) + beside
        for tokens in (question.context, model.max_model_len)
    )
    return Arm(
        DENSE,
        kept=f"{_KEPT[bool(model.full_layers)]}{_other_layers(question, size)}",
        block_bytes=each,
        pool_blocks=blocks,
        pool_bytes=blocks * each,
        prompt_blocks=prompt,
        request_blocks=held,
        request_bytes=held * each,
        fits=max(blocks - 1, 0) // held,
        step_ms=dense_ms(question, question.context),
        speedup=1.0,
        serve=_serve(question, DENSE, {}),
    )


def _policy(question: Question, name: str, settings: Any) -> Arm:
    size = question.blocks_of(name)
    policy = _policy_of(question, name, settings, question.model.max_model_len)
    each = _block_bytes(question, size) * policy.numbers_per_token // (2 * policy.shape.head_dim)
    context, longest = question.context, question.model.max_model_len
    beside = _window_blocks(question, size)
    blocks, prompt = pool_room(question) // each, -(-context // size) + beside
    held = policy.held_blocks(context, longest) + beside

    def milliseconds(tokens: int) -> float:
        longer = tokens + question.output
        return policy_ms(question, _policy_of(question, name, settings, longer), tokens)

    reason = policy.retention(context).reason
    kept = f"serves this densely ({reason})" if reason else policy.describe()
    return Arm(
        name,
        kept=kept + _other_layers(question, size),
        block_bytes=each,
        pool_blocks=blocks,
        pool_bytes=blocks * each,
        prompt_blocks=prompt,
        request_blocks=held,
        request_bytes=held * each,
        # One prompt after the other is read, in all its blocks.
        fits=bounds.most_rows(max(blocks - 1, 0), held, max(prompt - held, 0)),
        step_ms=milliseconds(context),
        speedup=dense_ms(question, context) / milliseconds(context),
        wins_from=wins_from(question, milliseconds),
        serve=_serve(question, name, question.settings),
    )


def _sparda(question: Question, name: str, settings: SpardaSettings) -> Arm:
    size, model = settings.block_size, question.model
    each = _block_bytes(question, size)
    held = -(-model.max_model_len // size)
    found = paging.sized(question, settings, each)
    heads = model.get_num_kv_heads(question.configuration(1).parallel_config)
    piece = each // (model.layers * heads)
    # A window's key in place of the keys and values of a stride's tokens.
    compressed = each * settings.windows_per_block // (2 * size)
    rows = heads * blocks_per_row(settings, model.max_model_len) * model.layers
    by_slab = found.served
    if not question.on_gpu and by_slab >= question.concurrency:
        by_slab = paging.MANY
    step = sparda_ms(question, settings, question.context, found.hosted_layers)

    def milliseconds(tokens: int) -> float:
        hosted = paging.hosted_layers_at(question, settings, each, tokens)
        return sparda_ms(question, settings, tokens, hosted)

    return Arm(
        name,
        kept=f"selector {settings.chosen_selector}, {settings.blocks_read} blocks read per KV head",
        block_bytes=compressed,
        pool_blocks=found.blocks,
        pool_bytes=found.blocks * compressed,
        prompt_blocks=-(-question.context // size),
        request_blocks=held,
        request_bytes=held * compressed + rows * piece,
        request_host_bytes=held * each * found.hosted_layers // model.layers,
        host_bytes=found.blocks * each * found.hosted_layers // model.layers * question.ranks,
        slab_bytes=sum(found.frames) * piece,
        fits=min((found.blocks - 1) // held, by_slab),
        step_ms=step,
        speedup=dense_ms(question, question.context) / step,
        wins_from=wins_from(question, milliseconds),
        left_out="" if question.on_gpu else CPU_LEAVES_OUT,
        serve=_serve(question, name, found.chosen),
    )


def _policy_of(question: Question, name: str, settings: Any, longest: int) -> Policy:
    model, ranks = question.model, question.configuration(1).parallel_config
    # Of a rank, as layers count: copies of a KV head share its query heads among them.
    group = model.get_num_attention_heads(ranks) // model.get_num_kv_heads(ranks)
    shape = CacheShape(model.get_head_size(), group, question.blocks_of(name), longest)
    return make_policy(name, settings, shape)


def _block_bytes(question: Question, size: int) -> int:
    model, config = question.model, question.configuration(1)
    heads = model.get_num_kv_heads(config.parallel_config)
    layers = _layers_of_a_block(model)
    return block_bytes(layers, heads, size, model.get_head_size(), model.dtype.itemsize)


def _layers_of_a_block(model: Model) -> int:
    """Those that keep every token, or if none does, those with windows."""
    return model.full_layers or model.windowed_layers


def _window_blocks(question: Question, size: int) -> int:
    """Blocks that a request which decodes holds for layers with sliding windows.

    vLLM makes groups of layers that take blocks of the same pool, so of the same size.
    """
    model = question.model
    if not model.windowed_layers:
        return 0
    window = min(int(model.text.get("sliding_window") or 1), model.max_model_len)
    each = -(-window // size) + 1  # a window may begin and end within blocks
    return -(-each * model.windowed_layers // _layers_of_a_block(model))


def _other_layers(question: Question, size: int) -> str:
    model = question.model
    windows, states = model.windowed_layers, model.other_layers - model.windowed_layers
    said = ""
    if windows:
        blocks = _window_blocks(question, size)
        said += f"; windows of {windows} of {model.layers} layers take {blocks} blocks of a request"
    if states:
        said += f"; states of {states} of {model.layers} layers come on top"
    return said


def _serve(question: Question, name: str, settings: dict[str, Any]) -> str:
    parts = [
        f"vllm serve {question.name}",
        f"--max-model-len {question.model.max_model_len}",
        f"--max-num-seqs {question.concurrency}",
    ]
    if question.ranks > 1:
        parts.append(f"--tensor-parallel-size {question.ranks}")
    if question.block_size is not None:
        parts.append(f"--block-size {question.block_size}")
    if name == DENSE or entries()[name].family != SPARDA:  # whose pool is host_gib
        if question.kv_bytes is not None:
            parts.append(f"--kv-cache-memory-bytes {question.kv_bytes}")
        elif question.on_gpu:
            parts.append(f"--gpu-memory-utilization {question.utilization}")
    if name != DENSE:
        parts.append(f"--attention-backend {name}")
    if settings:
        parts.append(f"--additional-config '{json.dumps({NAMESPACE: settings})}'")
    return " ".join(parts)
