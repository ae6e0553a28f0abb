# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies on top of a stock attention backend: what CPUs and GPUs have in common.

Prompts run through the stock kernels, exactly and densely. From a prompt's end on, the request's
rows are split off and served as the policy says, whatever else is in the batch.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sparse import metrics
from vllm_sparse.backends.allowed import allowed_requests
from vllm_sparse.backends.base import (
    SparseBackend,
    ask_for_prompt_lengths,
    final_scales,
    layers_that_attend,
    warn_of_slow_kernels,
)
from vllm_sparse.backends.controls import replayed, watch_controls
from vllm_sparse.backends.refusals import check_layer, takes_gpu_path
from vllm_sparse.config import load_settings
from vllm_sparse.device_room import mlp_bytes
from vllm_sparse.features import POLICIES, refuse
from vllm_sparse.instance import instance_of
from vllm_sparse.kernels.fp8 import as_numbers
from vllm_sparse.kv.spec import PolicySpec
from vllm_sparse.policies.making import make_policy
from vllm_sparse.policies.protocol import Policy, Shape
from vllm_sparse.steps.drafts import Drafts
from vllm_sparse.steps.layer import SparseLayer
from vllm_sparse.steps.parked import compact_parked
from vllm_sparse.steps.split import StepMetadata, StepPlanner
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.control import Allowed
    from vllm_sparse.kernels.dispatch import PolicyKernels
    from vllm_sparse.kv.tail.codec import Reader
    from vllm_sparse.policies.protocol import PolicySettings

# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse")


@dataclass(frozen=True)
class Context:
    """What a policy is made from, beside a layer's spec.

    Attributes:
        backend: The chosen name.
        settings: Its settings.
        group_size: Query heads per KV head.
        max_model_len: Longest request in tokens.
        instance: Name of the server.
        dtype: The model's.
        allowed: What requests may ask for.
        copied_bytes: Of a layer, that a step may copy for the prefix cache.
        layers: vLLM's part of the configuration that knows all layers in the end. Of the whole,
            a part of a model has a view only, which may not outlive the model's construction.
    """

    backend: str
    settings: PolicySettings
    group_size: int
    max_model_len: int
    instance: str
    dtype: torch.dtype
    allowed: Allowed | None
    copied_bytes: int
    layers: weakref.ref[CompilationConfig]

    def policy(self, head_dim: int, block_size: int, cache_dtype: torch.dtype) -> Policy:
        """The policy for layers of this shape.

        Args:
            head_dim: D.
            block_size: Tokens per block.
            cache_dtype: As vLLM allocates it: fp8 are bytes.

        Raises:
            UnsupportedError: Blocks or heads do not suit the policy's pages.
        """
        slots = self.dtype.itemsize if cache_dtype == torch.uint8 else 1
        shape = Shape(head_dim, self.group_size, block_size, self.max_model_len, query_slots=slots)
        return make_policy(self.backend, self.settings, shape)


class PolicyBackend(SparseBackend):
    """What vLLM asks of the class; the registry's names are subclasses of it."""

    # Set by the first layer that is built: customize_spec gets nothing but the spec, and is called
    # outside vLLM's config context.
    context: ClassVar[Context | None] = None

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Attach the policy and its index's bytes to full-attention specs."""
        if not isinstance(spec, FullAttentionSpec) or isinstance(spec, PolicySpec):
            return spec
        context = cls.context
        assert context is not None, "a layer of ours is built before its spec is asked for"
        policy = context.policy(spec.head_size, spec.block_size, spec.dtype)
        layers = context.layers()
        assert layers is not None, "an engine has its configuration"
        others = bool(layers_that_attend(layers)[1])
        names = context.backend, context.instance
        return PolicySpec.wrap(spec, policy, *names, others, context.allowed, context.copied_bytes)


def set_up_layer(
    config: VllmConfig, stock: type, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Check a layer that is about to be built and note what its spec will need.

    Args:
        config: vLLM's configuration.
        stock: The stock implementation.
        arguments: What its constructor gets.
        named: The same by name.

    Raises:
        UnsupportedError: The layer cannot be served sparsely.
    """
    given = inspect.signature(stock).bind(*arguments, **named).arguments
    name = config.attention_config.backend.name
    settings = load_settings(config.additional_config, name.lower())
    check_layer(
        name,
        takes_gpu_path(settings),
        alibi_slopes=given.get("alibi_slopes"),
        sinks=given.get("sinks"),
        logits_soft_cap=given.get("logits_soft_cap"),
        attn_type=given.get("attn_type", "decoder"),
        kv_sharing_target_layer_name=given.get("kv_sharing_target_layer_name"),
        sliding_window=given.get("sliding_window"),
        kv_cache_dtype=given["kv_cache_dtype"],
        expected_cache_dtype=str(config.cache_config.cache_dtype),
    )
    known = None if PolicyBackend.context is None else PolicyBackend.context.layers()
    if config.speculative_config is not None and known is config.compilation_config:
        # A drafter's layers, built last and under a copy of the configuration, share our blocks.
        return
    PolicyBackend.context = Context(
        name,
        settings,
        given["num_heads"] // given["num_kv_heads"],
        config.model_config.max_model_len,
        instance_of(config).name,
        config.model_config.dtype,
        allowed_requests(config),
        mlp_bytes(config),
        weakref.ref(config.compilation_config),
    )


class Planning:
    """Sets the layers of a group up, and plans every step once for all of them.

    Args:
        spec: The group's.
        layer_names: Its layers.
        config: vLLM's configuration.
        block_size: Of the stock metadata builder; of the block table.
        kernels: What layers run.
        truncates: How the stock kernel makes fp8 numbers, see :class:`.fp8.Scales`.
        reader: Makes what reads the stock pages of a layer.

    Attributes:
        policy: Decides.
        planner: Splits batches.
        layers: vLLM's attention layers.
        count: Receives what is counted in a step, by one of the groups.

    Raises:
        UnsupportedError: vLLM's block size or the heads of the layers do not suit the policy.
    """

    def __init__(
        self,
        spec: PolicySpec,
        layer_names: list[str],
        config: VllmConfig,
        block_size: int,
        kernels: PolicyKernels,
        truncates: bool,
        reader: Callable[[Any], Reader],
    ) -> None:
        self.policy = policy = spec.policy
        wanted, on_gpu = policy.shape.block_size, takes_gpu_path(policy.settings)
        # GPUs' kernels may take a block in parts.
        if wanted != block_size and not (on_gpu and wanted % block_size == 0):
            refuse("other-blocks", POLICIES, on_gpu, wanted=wanted, size=block_size)
        if wanted != block_size:
            _check_parts(spec, block_size)
        if len(policy.page_sizes) > 1:  # start-up has seen settings only
            refuse("page-sizes", POLICIES, on_gpu, sizes=list(policy.page_sizes))
        self.planner = StepPlanner(policy, block_size)
        ask_for_prompt_lengths(config)
        context = config.compilation_config.static_forward_context
        self.layers = [context[name] for name in layer_names]
        for name, layer in zip(layer_names, self.layers, strict=True):
            group_size = layer.impl.num_heads // layer.impl.num_kv_heads
            if group_size != policy.shape.group_size:
                ratios = {"found": group_size, "expected": policy.shape.group_size}
                refuse("unlike-layers", POLICIES, on_gpu, backend=spec.backend, **ratios)
            # The spec, which the scheduler evaluates too, does not know a layer's scale and sinks.
            # These are the layer's own numbers: weights that are loaded again change them, too.
            sinks = None if layer.impl.sinks is None else layer.impl.sinks.detach()
            shape = replace(policy.shape, scale=layer.impl.scale, learned_sinks=sinks)
            layer.impl.sparse = SparseLayer(
                replace(policy, shape=shape),
                {size: spec.layout(size) for size in policy.page_sizes},
                reader(layer),
                kernels,
                reads_all=extract_layer_index(name) < policy.settings.skip_layers,
                most_rows=1 + config.num_speculative_tokens,
                **_of_fp8(layer, spec, config, truncates),
            )
        watch_controls(config)
        counters, speaks = metrics.counters(), config.parallel_config.rank == 0
        kind = type(self.layers[0].impl)
        first = next(n for n, x in context.items() if isinstance(getattr(x, "impl", None), kind))
        # Beside window layers, ours may be several groups, which all see every row.
        self.count = counters.add if first in layer_names else count_nothing
        counters.publish_to(metrics.folder(instance_of(config).name), POLICIES, speaks=speaks)
        if speaks:
            warn_of_slow_kernels(kernels.note)
            _warn_of_density(spec, config.model_config.max_model_len)
            logger.info_once(_start_line(spec, config, kernels, self._stock_layers(context)))

    def _stock_layers(self, context: dict[str, Any]) -> str:
        """Says how many layers of a mixed model are not served by us, if any."""
        impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
        served = sum(isinstance(impl, type(self.layers[0].impl)) for impl in impls)
        if served == len(impls):
            return ""
        return (
            f"; {served} of {len(impls)} attention layers, the others have sliding windows and "
            "stay stock"
        )

    def compact_begun(
        self,
        common: CommonAttentionMetadata,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        controls: Tensor | None,
        count: Callable[..., None] | None = None,
    ) -> None:
        """Compact prompts of which a batch computes the first tokens behind.

        Before anything reads it: a captured graph may run the step, and compaction is not part of
        it. The blocks that it gives up are still their request's: the scheduler takes them once
        this step is processed. Arguments: :meth:`split`.
        """
        start, table = common.query_start_loc_cpu, common.block_table_tensor
        batch = start[: common.num_reqs + 1], seq_lens, prompt_lens, controls, table
        prompts = self.planner.prompts.begun(*batch, count or self.count)
        if prompts:
            layers = [(layer.impl.sparse, as_numbers(layer.kv_cache)) for layer in self.layers]
            compact_parked(layers, prompts)

    def split(
        self,
        common: CommonAttentionMetadata,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        controls: Tensor | None,
        build: Callable[[int, CommonAttentionMetadata, bool], Any],
        counted: Tensor | None = None,
        count: Callable[..., None] | None = None,
    ) -> StepMetadata:
        """Split the batch into dense tokens, ending prompts and sparse decode tokens.

        Args:
            common: The batch.
            seq_lens: Tokens of each row after the step, on the host, ``[R]``.
            prompt_lens: Prompt tokens of each row's request, on the host, ``[R]``.
            controls: What these ask for, on the host, ``[R]``; ``None`` if nothing.
            build: The stock builder's.
            counted: Given where drafts make ``seq_lens`` an upper bound; see
                :class:`.drafts.Drafts`.
            count: Receives what is counted on the host, if not :attr:`count`.
        """
        rows = common.num_reqs
        device = common.block_table_tensor.device
        drafts = None
        if counted is not None:
            exact = common.seq_lens[:rows]
            drafts = Drafts(exact - upload(seq_lens.int(), device), counted)

        def dense(rows: Tensor | None, tokens: Tensor | None, lens: Tensor | None) -> Any:
            part = common
            if rows is not None:
                assert tokens is not None
                assert lens is not None
                start = torch.searchsorted(tokens, common.query_start_loc_cpu[:-1].long()[rows])
                start = torch.cat((start, torch.tensor([len(tokens)]))).int()
                there, final = upload(rows, device), upload(lens, device)
                if drafts is not None:
                    final = final + drafts.off[there]
                part = common.replace(
                    query_start_loc=upload(start, device),
                    query_start_loc_cpu=start,
                    seq_lens=final,
                    num_reqs=len(rows),
                    num_actual_tokens=len(tokens),
                    max_query_len=int(start.diff().max()),
                    max_seq_len=int(lens.max()),
                    block_table_tensor=common.block_table_tensor[there],
                    slot_mapping=common.slot_mapping[upload(tokens, device)],
                )
            # Of a part, without a schedule: that lies in one buffer, which is the whole batch's.
            return build(0, part, rows is not None)

        return self.planner.split(
            common.query_start_loc_cpu[: rows + 1],
            seq_lens,
            prompt_lens,
            common.block_table_tensor[:rows],
            common.slot_mapping,
            dense,
            count or self.count,
            controls,
            drafts,
            replayed(common),
        )


def _check_parts(spec: PolicySpec, part: int) -> None:
    """Refuse parts of blocks that pages or waiting queries do not fit into."""
    policy = spec.policy
    make_policy(spec.backend, policy.settings, replace(policy.shape, block_size=part))
    if (places := policy.places_in_parts(part)) < policy.window:
        sizes = {"size": policy.shape.block_size, "part": part, "window": policy.window}
        refuse("narrow-parts", POLICIES, True, places=places, **sizes)


def count_nothing(*_: Any) -> None:
    """For steps that serve nobody, and groups that see what another one counts."""


def _of_fp8(layer: Any, spec: PolicySpec, config: VllmConfig, truncates: bool) -> dict[str, Any]:
    """What a layer needs to know of an fp8 cache."""
    if spec.dtype != torch.uint8:
        return {}
    scales = final_scales(layer, truncates)
    return {"scales": scales, "query_dtype": config.model_config.dtype}


def _warn_of_density(spec: PolicySpec, longest: int) -> None:
    """Say so if no prompt that the model takes would be served sparsely."""
    policy = spec.policy
    # Whole blocks are kept or not, so that of some lengths a few tokens less may be sparse.
    lengths = range(max(longest - 2 * policy.shape.block_size, 1), longest)
    if not any(policy.retention(length).sparse for length in lengths):
        logger.warning_once(
            f"{spec.backend}: all prompts will be served densely: with at most {longest} tokens, "
            f"none is longer than min_context ({policy.settings.min_context}) and what is kept. "
            "Lower vllm_sparse.min_context or token_budget, or leave out --attention-backend"
        )


def _start_line(spec: PolicySpec, config: VllmConfig, kernels: PolicyKernels, others: str) -> str:
    policy, longest = spec.policy, config.model_config.max_model_len
    size = policy.shape.block_size
    parts = "" if size == spec.block_size else f" in parts of {spec.block_size}"
    held = -(-longest // size)
    index = policy.index_width // min(policy.page_sizes)
    return (
        f"{spec.backend}: {policy.describe()}, block size {size}{parts}, prompts above "
        f"{policy.settings.min_context} tokens served sparsely; a prompt of {longest} tokens keeps "
        f"{policy.held_blocks(longest, longest)} of {held} blocks; the page index takes "
        f"{100 * index // (2 * spec.head_size + index)}% of each block; "
        f"decode kernel: {kernels.name if policy.fused else 'PyTorch'}{others}"
    )
