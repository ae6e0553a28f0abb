# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a GPU would bring, in plain PyTorch, so that engines can walk the GPU's path on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from support import suffixes
from support.capture import allow, capturing
from support.devices import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    # Of every builder its first metadata for as many tokens.
    Captured = WeakKeyDictionary[Any, dict[int, Any]]


def forked_workers() -> None:
    """Fork engine and workers, which vLLM spawns on CPUs: each would import it anew."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]


def no_compiler() -> None:
    """Leave what vLLM compiles where ranks share work: the interpreter's Triton has no compiler."""
    torch.compiler.set_stance("force_eager")


def suffix_package() -> None:
    """The package of ``suffix`` drafts, of which PyPI has sources only."""
    if importlib.util.find_spec(suffixes.PACKAGE) is None:
        suffixes.install()


def flash_attention() -> None:
    """FlashAttention and its cache write, float32 and on any device."""
    from vllm.v1.attention.backends import flash_attn

    flash_attn.get_flash_attn_version = lambda **_: 2
    flash_attn.flash_attn_supports_sinks = lambda: True
    flash_attn.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True
    flash_attn.flash_attn_varlen_func = allow(attend)
    flash_attn.reshape_and_cache_flash = allow(write)


def attend(
    *,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    cu_seqlens_q: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    seqused_k: Any = None,
    block_table: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    s_aux: Any = None,
    **_: Any,
) -> None:
    assert causal
    if k.dtype == torch.float8_e4m3fn:
        scales = (q_descale, k_descale, v_descale)
        q, k, v = (
            part.float() * (1.0 if scale is None else scale.flatten()[0])
            for part, scale in zip((q, k, v), scales, strict=True)
        )
    if block_table is None:  # each row's keys are its own page
        longest = int(cu_seqlens_q.diff().max())
        seqused_k = cu_seqlens_q.diff()
        block_table = torch.arange(len(seqused_k))[:, None]
        place = (cu_seqlens_q[:-1, None] + torch.arange(longest)).clamp(max=len(k) - 1)
        k, v = k[place], v[place]
    # A GPU computes no rows beyond these.
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    assert max_seqlen_k >= int(seqused_k.max())
    assert q.shape[0] >= int(cu_seqlens_q[-1])
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q)):
        length, count = int(seqused_k[row]), int(end - begin)
        if not count:
            continue
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (
            part[blocks].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // k.shape[2], 1)
            for part in (k, v)
        )
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        query, keys, values = (part.transpose(0, 1) for part in (q[begin:end], keys, values))
        if s_aux is None:
            attended = torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, mask, scale=softmax_scale
            )
        else:  # [H, count, length and one]
            logits = (query @ keys.mT * softmax_scale).masked_fill(~mask, -torch.inf)
            sinks = s_aux.to(logits.dtype)[:, None, None].expand(-1, count, 1)
            attended = torch.cat((logits, sinks), -1).softmax(-1)[..., :length] @ values
        out[begin:end] = attended.transpose(0, 1)


def write(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slots: Any,
    kv_cache_dtype: str = "auto",
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    if kv_cache_dtype.startswith("fp8"):
        key, value = (
            (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
            for part, scale in ((key, k_scale), (value, v_scale))
        )
    slots = slots[slots >= 0].long()
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key[: len(slots)]
    value_cache[block, offset] = value[: len(slots)]


def compiled_in_pieces() -> None:
    """Compile as on a GPU: the pieces between layers' attention, which is opaque to the compiler.

    On CPUs vLLM would have it trace the model as a whole, attention included.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    real = platform.check_and_update_config

    def update(config: Any) -> None:
        compilation = config.compilation_config
        kept = compilation.mode, compilation.backend
        real(config)
        compilation.mode, compilation.backend = kept

    platform.check_and_update_config = staticmethod(update)
    platform.opaque_attention_op = staticmethod(lambda: True)


QUERY_SCALE, KEY_SCALE, VALUE_SCALE = 0.9, 0.37, 1.7


def kv_scales() -> None:
    """Scales of an fp8 cache as a checkpoint may bring them."""
    from vllm.model_executor.layers.attention import attention

    real = attention.set_default_quant_scales

    def scaled(layer: Any, register_buffer: bool = False) -> None:
        real(layer, register_buffer)
        layer._q_scale.fill_(QUERY_SCALE)
        layer._k_scale.fill_(KEY_SCALE)
        layer._v_scale.fill_(VALUE_SCALE)
        layer._q_scale_float = QUERY_SCALE
        layer._k_scale_float, layer._v_scale_float = KEY_SCALE, VALUE_SCALE

    attention.set_default_quant_scales = scaled


def no_read_backs() -> None:
    """Let plans of real batches fail if they read a tensor of the device back."""
    from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder

    build, cpu = PolicyGpuBuilder.build, torch.Tensor.cpu

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError("a plan reads a tensor back, which waits for the step before")

    def guarded(self: Any, prefix: int, common: Any, *args: Any, **kwargs: Any) -> Any:
        if common.rswa_prefix_lens is not None:
            torch.Tensor.cpu = refuse
        try:
            return build(self, prefix, common, *args, **kwargs)
        finally:
            torch.Tensor.cpu = cpu

    PolicyGpuBuilder.build = guarded


def loose_lengths() -> None:
    """Let the host know lengths of requests that decode as upper bounds only, at random.

    So it is on a GPU, where the runner plans ahead of what is rejected; on a CPU it would know.
    """
    from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder

    build, generator = PolicyGpuBuilder.build, torch.Generator().manual_seed(0)

    def loosened(self: Any, prefix: int, common: Any, *args: Any, **kwargs: Any) -> Any:
        bound, prompts = common.seq_lens_cpu_upper_bound, common.rswa_prefix_lens
        if bound is not None and prompts is not None:
            lens, rows = bound.clone(), min(len(bound), len(prompts))
            start = lens[:rows] - common.query_start_loc_cpu.diff()[:rows]
            more = torch.randint(0, 6, (rows,), generator=generator, dtype=lens.dtype)
            # The first of these steps has nothing before it that could be rejected.
            lens[:rows] += torch.where(start > prompts[:rows].to(lens.device), more, 0)
            common = common.replace(seq_lens_cpu_upper_bound=lens)
        return build(self, prefix, common, *args, **kwargs)

    PolicyGpuBuilder.build = loosened


def oracle_on_the_device() -> None:
    """The oracle in place of Model Runner V2's own look-up, which the interpreter does not run.

    As many tokens for every row, as from all of that runner's drafters; two drafts of three go
    wrong somewhere.
    """
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    def propose(self: Any, input_batch: Any, *_: Any, dummy_run: bool = False, **__: Any) -> Any:
        drafts, states = self.drafts[: input_batch.num_reqs].zero_(), self.req_states
        for row, index in enumerate([] if dummy_run else input_batch.idx_mapping.tolist()):
            count = int(states.total_len.gpu[index])
            known = states.all_token_ids.gpu[index, :count].tolist()
            texts = self.vllm_config.additional_config["oracle"]
            whole = next((text for text in texts if text[:count] == known), [])
            draft = torch.tensor(whole[count : count + drafts.shape[1]], dtype=drafts.dtype)
            drafts[row, : len(draft)] = draft
            if count % 3 < 2:
                drafts[row, count // 2 % drafts.shape[1]] += 1
        return drafts

    NgramGPUSpeculator.propose = propose


def captured_graphs() -> None:
    """Run batches of single tokens as a captured CUDA graph would: with the first metadata.

    A graph keeps the addresses and the Python numbers of the step that it was captured in. So the
    builder still plans every step, but layers see what it returned for the first batch of that
    size. And layers do nothing with it that no capture allows.
    """
    from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder, PolicyGpuImpl
    from vllm_sparse.backends.sparda import SpardaImpl
    from vllm_sparse.backends.sparda_gpu import SpardaGpuBuilder

    # By the builder itself: one made in the place of one that was thrown away has its address.
    captured: Captured = WeakKeyDictionary()
    for builder in (PolicyGpuBuilder, SpardaGpuBuilder):
        builder._plan_rows = _replayed(builder._plan_rows, captured)  # type: ignore[method-assign]
    for impl in (PolicyGpuImpl, SpardaImpl):
        impl.forward = _in_capture(impl.forward, captured)  # type: ignore[method-assign]


def _in_capture(forward: Any, captured: Captured) -> Any:
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.getcallargs(forward, self, *args, **kwargs)["attn_metadata"]
        is_captured = any(given is step for steps in captured.values() for step in steps.values())
        with capturing() if is_captured else contextlib.nullcontext():
            return forward(self, *args, **kwargs)

    return guarded


def _replayed(plan: Any, captured: Captured) -> Any:
    def replay(self: Any, common: Any, *args: Any) -> Any:
        step = plan(self, common, *args)
        first = captured.setdefault(self, {}).setdefault(step.num_tokens, step)
        # What moves is not what a graph reads; and nobody keeps the metadata that it was captured
        # with, so that its other tensors would be freed under it.
        assert _addresses(step) == _addresses(first), "a captured graph reads freed memory"
        return first

    return replay


def _addresses(step: Any) -> list[int]:
    """Where the tensors of a step are, those without elements apart."""
    return [tensor.data_ptr() for _, tensor in tensors_of(step) if tensor.numel()]


def profiled_graphs() -> None:
    """Start as vLLM does on a GPU: without a cache, to measure memory, then with a few blocks.

    For these, which serve to measure graphs, builders are made, batches run, and everything is
    thrown away.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    torch.accelerator.synchronize = torch.accelerator.empty_cache = lambda: None
    real = model_runner.GPUModelRunner.initialize_kv_cache

    def initialize(self: Any, config: Any, is_profiling: bool = False, **options: Any) -> None:
        if not is_profiling:
            self._dummy_run(4, skip_attn=True, is_profile=True)
            blocks, self.cache_config.num_gpu_blocks = self.cache_config.num_gpu_blocks, None
            self.compilation_config.max_cudagraph_capture_size = 4
            with set_current_vllm_config(self.vllm_config):
                cudagraph_utils._init_minimal_kv_cache_for_profiling(self)
            for tokens in (1, 4):
                self._dummy_run(tokens, skip_attn=False, uniform_decode=tokens == 1)
            for layer in self.compilation_config.static_forward_context.values():
                ours = getattr(layer.impl, "layer", None)
                assert ours is None or ours.pager.num_blocks < blocks, "a whole pool for nothing"
            cudagraph_utils._teardown_profiling_state(self)
            self.cache_config.num_gpu_blocks = blocks
        real(self, config, is_profiling=is_profiling, **options)

    model_runner.GPUModelRunner.initialize_kv_cache = initialize


def zeroed_parts() -> None:
    """Zero new blocks where kernels take them in parts; vLLM's runner for CPUs never does that."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def zero(self: Any, block_ids: list[int]) -> None:
        layers = self.compilation_config.static_forward_context
        for group in self.kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, FullAttentionSpec):
                for name in group.layer_names:
                    whole = layers[name].kv_cache.unflatten(
                        0, (self.kv_cache_config.num_blocks, -1)
                    )
                    for block in block_ids:
                        whole[block].zero_()

    CPUModelRunner._zero_block_ids = zero


def float32_delta_nets() -> None:
    """Gated delta nets in float32 by Hugging Face's functions; vLLM's CPU kernels take bfloat16.

    With drafts as vLLM's kernels for GPUs have them: a row's tokens each leave a state in a block
    of their own, and the next step reads the one that the last accepted token has left; the
    convolution's tokens stay in one block, as many more as there are drafts.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as hugging_face
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.utils.torch_utils import _resolve_layer_name

    def core(mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any, layer_name: Any) -> None:
        name, context = _resolve_layer_name(layer_name), get_forward_context()
        layer = context.no_compile_layers[name]
        if context.attn_metadata is None:
            return
        past, states = layer.kv_cache  # [blocks, at least width - 1, channels], [.., heads, V, K]
        if gdn_attention.is_conv_state_dim_first():
            past = past.transpose(1, 2)
        weight = layer.conv1d.weight.flatten(0, 1)[:, None]
        width = weight.shape[-1] - 1
        gate = -layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias)
        for tokens, blocks, accepted in _rows_of_states(context.attn_metadata[layer.prefix]):
            before, state = torch.zeros_like(past[0, :width]), None
            if accepted:
                before = past[blocks[0], accepted - 1 : accepted - 1 + width].clone()
                state = states[blocks[accepted - 1]].transpose(-1, -2)[None].clone()
            text = torch.cat((before, mixed_qkv[tokens]))
            turned = torch.nn.functional.conv1d(text.T, weight, groups=text.shape[1])
            kept = text[1 if len(blocks) > 1 else -width :]
            past[blocks[0], : len(kept)] = kept
            parts = layer.rearrange_mixed_qkv(torch.nn.functional.silu(turned.T))
            size = 1 if len(blocks) > 1 else len(tokens)
            for block, begin in zip(blocks, range(0, len(tokens), size), strict=False):
                at, part = slice(begin, begin + size), tokens[begin : begin + size]
                core_attn_out[part], state = hugging_face.torch_recurrent_gated_delta_rule(
                    *(x[:, at] for x in parts), gate[None, part], b[None, part].sigmoid(),
                    initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
                )  # fmt: skip
                states[block] = state[0].transpose(-1, -2)

    real = gdn_attention.cpu_gdn_attention_core
    core.__signature__ = inspect.signature(real, eval_str=True)  # type: ignore[attr-defined]
    gdn_attention.cpu_gdn_attention_core = core


def _rows_of_states(step: Any) -> Iterator[tuple[torch.Tensor, list[int], int]]:
    """Of each row its tokens, blocks for states, and how many tokens were accepted before; or 0."""
    if step.non_spec_query_start_loc is not None:
        started = [True] * step.num_decodes
        if step.num_prefills:
            started = step.has_initial_state.tolist()
        bounds = step.non_spec_query_start_loc.tolist()
        tokens = step.non_spec_token_indx
        tokens = torch.arange(bounds[-1]) if tokens is None else tokens
        for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if end > begin:
                block = int(step.non_spec_state_indices_tensor[row])
                yield tokens[begin:end], [block], int(started[row])
    if step.num_spec_decodes:
        bounds = step.spec_query_start_loc[: step.num_spec_decodes + 1].tolist()
        for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
            blocks = step.spec_state_indices_tensor[row].tolist()
            yield step.spec_token_indx[begin:end], blocks, int(step.num_accepted_tokens[row])


EVENTS = "TESTS_NOTED_EVENTS"


def noted_events() -> None:
    """Write what is published of the prefix cache to a file, in order, each event a line."""
    import msgspec
    from vllm.distributed.kv_events import EventPublisher, EventPublisherFactory

    class Noted(EventPublisher):
        def __init__(self, data_parallel_rank: int = 0, **_: Any) -> None:
            super().__init__(data_parallel_rank)

        def publish(self, events: Any) -> None:
            with Path(os.environ[EVENTS]).open("ab") as file:
                for event in events.events:
                    file.write(msgspec.json.encode(event) + b"\n")

        def shutdown(self) -> None:
            pass

    EventPublisherFactory._registry["zmq"] = Noted
