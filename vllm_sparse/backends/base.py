# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What both backends tell vLLM of themselves, and how they learn a request's prompt length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_sparse.backends.asked import FP8_CACHES, PLAIN_CACHES, PROMPT_LENGTHS
from vllm_sparse.errors import IntegrityError
from vllm_sparse.kernels.fp8 import Scales
from vllm_sparse.seams import replace_once

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_layout import KVCacheLayout


class SparseBackend:
    """First base of our backends, a stock one second: decoder layers that write their cache."""

    # ROCKETKV may write a replayed token only after compaction; SPARDA writes in the order that its
    # copies allow.
    forward_includes_kv_cache_update: bool = True
    # From vLLM 0.33 on, models may write keys and values into a stock cache before the layer runs.
    supports_kv_cache_update_bypass: bool = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*PLAIN_CACHES, *FP8_CACHES]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder layers only."""
        return attn_type == "decoder"

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How often a row's work is split depends on the batch."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """Kernels take one scale for all keys of a layer, and one for its values."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major, so that a page of one KV head is one run of memory."""
        # Not above: `vllm-sparse plan` asks what is refused, and vLLM takes seconds to import.
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)


def warn_of_slow_kernels(note: str) -> None:
    """Say at start-up that PyTorch does what compiled kernels should.

    Args:
        note: Why they cannot be had; empty if they run.
    """
    from vllm.logger import init_logger

    if note:
        init_logger("vllm.sparse").warning_once(
            "PyTorch's reference kernels run, many times slower than the C++ ones, which cannot be "
            f"had: {note}"
        )


def layers_that_attend(config: CompilationConfig) -> tuple[list[Any], list[Any]]:
    """Layers of a loaded model that keep something of the past: ours, and others.

    Args:
        config: vLLM's part of the configuration that knows all layers.
    """
    ours: list[Any] = []
    others: list[Any] = []
    for layer in config.static_forward_context.values():
        if hasattr(layer, "get_attn_backend"):
            mine = issubclass(layer.get_attn_backend(), SparseBackend)
            (ours if mine else others).append(layer)
    return ours, others


def final_scales(layer: Any, truncates: bool) -> Scales:
    """Scales of a layer's fp8 cache, whose weights are loaded; they are not to change any more.

    Stock attention reads them anew in each step. Ours are in what is planned, and on GPUs in
    captured graphs, so weights that are loaded later must bring the same ones.

    Args:
        layer: vLLM's attention layer.
        truncates: Whether the stock kernel rounds new numbers towards zero.
    """
    scales = Scales(layer._k_scale_float, layer._v_scale_float, truncates)
    process = layer.impl.process_weights_after_loading

    def check(dtype: torch.dtype) -> None:
        process(dtype)
        found = layer._k_scale_float, layer._v_scale_float
        if found != (scales.key, scales.value):
            raise IntegrityError(
                f"{layer.layer_name}: new weights bring scales {found} for the fp8 cache, which "
                f"runs with {(scales.key, scales.value)}. Start the server with this checkpoint, "
                "or without --kv-cache-dtype fp8"
            )

    layer.impl.process_weights_after_loading = check
    return scales


def ask_for_prompt_lengths(vllm_config: VllmConfig) -> None:
    """Make the model runner hand each request's prompt length to the metadata builder.

    Both runners do if this is set; nothing else reads it for our backends. A stock builder, as of
    layers with sliding windows, would take it for a model with such a window, and copy the lengths
    of as many requests as a captured graph has rows. So none is made while it is set.
    """
    from vllm.v1.worker.utils import AttentionGroup

    def make(stock: Any) -> Any:
        def create_metadata_builders(
            self: Any, vllm_config: VllmConfig, *args: Any, **named: Any
        ) -> None:
            asked = vllm_config.model_config.model_arch_config.rswa_window == PROMPT_LENGTHS
            withdraw(vllm_config)
            stock(self, vllm_config, *args, **named)
            if asked:
                ask_for_prompt_lengths(vllm_config)

        return create_metadata_builders

    replace_once(AttentionGroup, "create_metadata_builders", make)
    vllm_config.model_config.model_arch_config.rswa_window = PROMPT_LENGTHS


def withdraw(vllm_config: VllmConfig) -> None:
    """Take back what an earlier builder asked for; vLLM builds a first one to measure graphs."""
    model = vllm_config.model_config.model_arch_config
    if model.rswa_window == PROMPT_LENGTHS:
        model.rswa_window = None


def is_rehearsal(common: CommonAttentionMetadata) -> bool:
    """Whether this is a dummy run, which counts for nothing: no prompt has a length."""
    lengths = common.rswa_prefix_lens
    return lengths is None or (lengths.device.type == "cpu" and not bool(lengths.any()))


def holds_prompts(common: CommonAttentionMetadata) -> bool:
    """Whether a row has tokens of a prompt or of a preempted request's replay."""
    return common.is_prefilling is not None and bool(common.is_prefilling.any())


def rehearsed(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """A batch of the same sizes, of nobody's tokens, which go to vLLM's null block.

    Model Runner V1 fills up what graphs capture, and what an idle rank computes beside the others
    of data parallelism, with the rows that its table happens to have: blocks of requests that wait
    or have just ended, which the prefix cache may know.
    """
    return common.replace(
        seq_lens=common.query_start_loc[: common.num_reqs + 1].diff(),
        seq_lens_cpu_upper_bound=common.query_start_loc_cpu[: common.num_reqs + 1].diff(),
        block_table_tensor=torch.zeros_like(common.block_table_tensor),
        rswa_prefix_lens=None,
        is_prefilling=None,
    )


def prompt_lengths(common: CommonAttentionMetadata) -> Tensor:
    """Prompt tokens of each row's request, int32 ``[R]``, zero for padding rows.

    On the device where the runner keeps them there (Model Runner V2), else on the host.

    Raises:
        IntegrityError: The runner does not say, though requests have a past.
    """
    lengths = common.rswa_prefix_lens
    if lengths is None:  # the requests of a dummy run consist of what it computes
        past = sequence_lengths(common) - common.query_start_loc_cpu[: common.num_reqs + 1].diff()
        if bool((past > 0).any()):
            raise IntegrityError(
                "vLLM's model runner no longer says how long prompts are, so that it is unknown "
                "which blocks hold what. Was its model configuration replaced while it ran? "
                "Restart the server"
            )
        return torch.zeros(common.num_reqs, dtype=torch.int32)
    padding = common.num_reqs - len(lengths)
    if padding > 0:
        lengths = torch.nn.functional.pad(lengths, (0, padding))
    return lengths[: common.num_reqs].int()


def sequence_lengths(common: CommonAttentionMetadata) -> Tensor:
    """Tokens of each row after the step, on the host, ``[R]``.

    The runner's upper bound is exact but for requests that decode where drafts are served: those
    that were rejected are still counted then, unless the runner waits for the device.
    """
    bound = common.seq_lens_cpu_upper_bound
    if bound is None:  # some dummy runs
        bound = common.seq_lens.cpu()
    return bound[: common.num_reqs]


def most_rows(vllm_config: VllmConfig) -> int:
    """Tokens that a batch without prompts may have, the padding of captured graphs included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    tokens = vllm_config.scheduler_config.max_num_seqs * (1 + vllm_config.num_speculative_tokens)
    return max(tokens, captured)
