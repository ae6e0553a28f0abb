# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one layer does with a planned step beside dense attention: compaction and sparse decode."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.kernels.fp8 import UNSCALED, Scales
from vllm_sparse.kv.tail.codec import PlainReader
from vllm_sparse.kv.tail.compaction import QueryParking, compact_prompt
from vllm_sparse.policies.controlled import policy_for
from vllm_sparse.steps.select import attend_tokens, select_tokens, store_index, store_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_sparse.kernels.dispatch import PolicyKernels
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kernels.types import Rows
    from vllm_sparse.kv.tail.codec import Reader
    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.steps.parked import ParkedPrompts
    from vllm_sparse.steps.prompts import PromptEnd
    from vllm_sparse.steps.split import Pages, SparseRows


# Policies of requests that bring a token budget, kept by budget.
_MOST_BUDGETS = 64


class SparseLayer:
    """One layer, on any device.

    Args:
        policy: Decides.
        layouts: Page geometry by page size.
        reader: Reads pages that the stock kernel has written.
        kernels: What layers run, and the policy's fused step if it names one.
        reads_all: Decode reads every kept token.
        most_rows: Of a request in a batch that is planned on the device; ``None``: unknown.
        scales: Of an fp8 cache.
        query_dtype: Of queries that wait in an fp8 cache; ``None`` where the cache is not.

    Attributes:
        parking: Where window queries wait for the prompt's end; ``None`` if nothing moves.
    """

    def __init__(
        self,
        policy: Policy,
        layouts: dict[int, PageLayout],
        reader: Reader,
        kernels: PolicyKernels,
        *,
        reads_all: bool,
        most_rows: int | None = None,
        scales: Scales = UNSCALED,
        query_dtype: torch.dtype | None = None,
    ) -> None:
        self.policy = policy
        self._policy_for = lru_cache(_MOST_BUDGETS)(partial(policy_for, policy))
        self.layouts = layouts
        self.stock_layout = layouts[min(layouts)]
        self.reads_all = reads_all or policy.top_k is None
        self.parking = (
            QueryParking(self.stock_layout, policy.shape.group_size, query_dtype)
            if policy.window
            else None
        )
        self._prompt_reader = reader
        # What was moved is plain, what stays in place is as the stock kernel wrote it.
        self._reader = PlainReader(self.stock_layout) if policy.moves else reader
        self._plain = isinstance(self._reader, PlainReader)
        self._kernels = kernels
        self._scale, self._sinks = policy.shape.logit_scale, policy.shape.learned_sinks
        self._scales, self._most_rows = scales, most_rows
        step = kernels.fused(policy.kernel) if policy.kernel else None
        self._compact_prompts: Callable[..., None] | None = None
        if step and step.compact_prompts and isinstance(reader, PlainReader):
            taken = {name: getattr(policy.settings, name) for name in step.settings}
            self._compact_prompts = partial(step.compact_prompts, **taken)
        self._fused: Callable[..., None] | None = None
        if policy.moves and self.reads_all:
            self._fused = kernels.decode
        elif step:
            self._fused = step.decode

    # -- prompts -----------------------------------------------------------------------------------

    def end_prompt(self, cache: Tensor, query: Tensor, prompt: PromptEnd) -> None:
        """Let the queries of a prompt's window wait, or compact it before the step's output.

        Args:
            cache: ``[blocks, G, block_size, C]``, changed.
            query: Post-RoPE queries of the step, ``[T, H, D]``.
            prompt: The prompt.
        """
        private = prompt.blocks[prompt.shared_blocks :]
        window = query[prompt.first_token : prompt.last_token]
        if not prompt.compacts:
            if self.parking is not None:
                self.parking.store(cache, private, prompt.parked, window)
            return
        if self.parking is None:
            window = window[:0]
        elif prompt.parked:
            window = torch.cat((self.parking.load(cache, private, prompt.parked), window))
        self._compact(cache, prompt, window)

    def compact_parked(self, cache: Tensor, prompt: PromptEnd) -> None:
        """Compact a prompt all of whose window queries wait."""
        if self.parking is not None:
            window = self.parking.load(cache, prompt.blocks[prompt.shared_blocks :], prompt.parked)
        else:
            heads = self.policy.shape.group_size * cache.shape[1]
            window = cache.new_empty(0, heads, self.policy.shape.head_dim)
        self._compact(cache, prompt, window)

    @property
    def compacts_together(self) -> bool:
        """A kernel compacts any number of prompts at once."""
        return self._compact_prompts is not None

    def compact_together(self, cache: Tensor, prompts: ParkedPrompts) -> None:
        """The same as :meth:`compact_parked` of several prompts, if :attr:`compacts_together`."""
        assert self.parking is not None
        window = self.parking.load_all(cache, prompts.tails, self.policy.window)
        rows = prompts.blocks, prompts.lengths, prompts.dropped
        layout = self.layouts[prompts.page_size]
        self._compact_rows(cache, window.transpose(1, 2), *rows, prompts.most_kept, layout)

    def _compact_rows(
        self,
        cache: Tensor,
        window: Tensor,
        blocks: Tensor,
        lengths: Tensor,
        dropped: Tensor,
        most_kept: int,
        layout: PageLayout,
    ) -> None:
        keys, values = layout.tokens(cache).split(layout.head_dim, -1)
        assert self._compact_prompts is not None
        self._compact_prompts(
            cache,
            keys,
            values,
            window,
            blocks,
            lengths,
            dropped,
            layout=layout,
            scale=self._scale,
            max_kept=most_kept,
            scales=self._scales,
            sinks=self._sinks,
        )

    def _compact(self, cache: Tensor, prompt: PromptEnd, window: Tensor) -> None:
        layout, dropped = self.layouts[prompt.page_size], prompt.dropped_blocks
        if self.compacts_together:
            length, gone = prompt.sizes.split(1)
            rows = window.transpose(0, 1)[None], prompt.blocks[None], length, gone
            kept = prompt.prompt_len - dropped * layout.block_size
            self._compact_rows(cache, *rows, kept, layout)
            return
        compact_prompt(
            cache,
            prompt.blocks,
            prompt.prompt_len,
            dropped,
            window.transpose(0, 1),
            policy=self.policy,
            reader=self._prompt_reader,
            layout=layout,
            key_scale=self._scales.key,
        )

    def index_pages(self, cache: Tensor, pages: Pages) -> None:
        """Bring the index up to what the step has written.

        Args:
            cache: ``[blocks, G, block_size, C]``, changed.
            pages: What was written.
        """
        if not self.policy.index_width or self.reads_all:
            return
        slots = pages.closing.long()
        size = self.stock_layout.block_size
        self._store_index(cache, slots // size, slots % size, self.stock_layout)

    def _store_index(self, cache: Tensor, block: Tensor, slot: Tensor, layout: PageLayout) -> None:
        store_index(cache, block, slot, policy=self.policy, reader=self._reader, layout=layout)

    # -- decode ------------------------------------------------------------------------------------

    def decode(
        self,
        cache: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: SparseRows,
        output: Tensor,
    ) -> None:
        """Attend the sparse tokens of a mixed step.

        Args:
            cache: ``[blocks, G, block_size, C]``, changed.
            query: ``[T, H, D]``.
            key: ``[T, G, D]``.
            value: ``[T, G, D]``.
            rows: Which tokens.
            output: ``[T, H, D]``, written at the rows' tokens.
        """
        index, target = rows.token_index, output
        if index is not None:
            query, key, value = query[index], key[index], value[index]
            target = torch.empty_like(query)
        elif (count := len(rows.lengths)) != len(query):
            query, key, value, target = query[:count], key[:count], value[:count], output[:count]
        layout, policy = self.layouts[rows.page_size], self._policy_for(rows.control)
        tables = rows.block_table, rows.lengths, rows.final_lengths, rows.top_r
        if self._fused is not None:
            tensors = cache, query, key, value, target, *tables
            self._fused(*tensors, layout=layout, **self._options(policy))
        else:
            if self.policy.moves:  # where tokens stay in place, all of the step are written first
                self._store(cache, key, value, *tables, layout)
            held = rows.block_table, rows.lengths, rows.top_r
            self._decode_selected(cache, query, target, *held, layout, policy)
        if index is not None:
            output[index] = target

    def decode_rows(
        self, cache: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Rows, output: Tensor
    ) -> None:
        """Attend a batch that was planned on the device token by token, in fixed shapes.

        Args:
            cache: ``[blocks, G, block_size, C]``, changed.
            query: ``[T, H, D]``; padding may follow the rows.
            key: ``[T, G, D]``.
            value: ``[T, G, D]``.
            rows: The rows.
            output: ``[T, H, D]``, written.
        """
        count, layout = len(rows.lengths), self.stock_layout
        query, key, value, output = query[:count], key[:count], value[:count], output[:count]
        several = rows.final_lengths is not None
        final = rows.final_lengths if rows.final_lengths is not None else rows.lengths
        tables = rows.block_table, rows.lengths, final, rows.top_r
        if self._fused is not None:
            parked: dict[str, Any] = {}
            if self.parking is not None:
                parked = {"parked": rows.parked, "per_block": self.parking.per_block}
            self._fused(
                cache, query, key, value, output, *tables, layout=layout, replays=several,
                most_rows=self._most_rows, **parked, **self._options(self.policy),
            )  # fmt: skip
            return
        if self.parking is not None:
            self.parking.store_at(cache, query, rows.parked)
        self._store(cache, key, value, *tables, layout)
        held = rows.block_table, rows.lengths, rows.top_r
        self._decode_selected(cache, query, output, *held, layout, self.policy)

    def _options(self, policy: Policy) -> dict[str, Any]:
        """What a fused step is told in every call."""
        return {
            "top_k": policy.top_k or 0,
            "scale": self._scale,
            "read_all": self.reads_all,
            "scales": self._scales,
            "sinks": self._sinks,
        }

    def _store(
        self,
        cache: Tensor,
        key: Tensor,
        value: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        final_lengths: Tensor,
        top_r: Tensor,
        layout: PageLayout,
    ) -> None:
        """Write the rows' newest tokens and their pages' index."""
        place = (lengths - 1).clamp(min=0).long()
        block = block_table.gather(1, (place // layout.block_size)[:, None])[:, 0].long()
        block = torch.where(lengths > 0, block, 0)
        slot = place % layout.block_size
        store_tokens(cache, key, value, block, slot, layout, self._scales)
        if self.policy.index_width:
            # Of several rows of one request, the last one in a page stores its index.
            closes = (lengths == final_lengths) | (lengths % layout.page_size == 0)
            if self.policy.moves:  # window queries may wait where a prompt's index would be
                closes &= top_r > 0
            self._store_index(cache, torch.where(closes, block, 0), slot, layout)

    def _decode_selected(
        self,
        cache: Tensor,
        query: Tensor,
        output: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        top_r: Tensor,
        layout: PageLayout,
        policy: Policy,
    ) -> None:
        table, reader, positions = block_table.long(), self._reader, None
        if not self.reads_all:
            positions = select_tokens(
                cache, query, table, lengths, policy=policy, reader=reader, layout=layout,
                scales=self._scales,
            )  # fmt: skip
        if not self._plain:
            if positions is None:
                held = torch.arange(table.shape[1] * layout.block_size, device=table.device)
                positions = held.expand(len(table), cache.shape[1], -1)
            attend_tokens(
                cache, query, output, positions, table, lengths, reader=reader, layout=layout,
                scale=self._scale, scales=self._scales, sinks=self._sinks,
            )  # fmt: skip
            return
        slots = None
        if positions is not None:
            size = layout.block_size
            block = table[:, None].expand(-1, positions.shape[1], -1).gather(2, positions // size)
            slots = (block * size + positions % size).int()
        self._kernels.attend_slots(
            cache, query, output, slots, block_table, lengths, top_r, layout=layout,
            top_k=policy.top_k or 0, scale=self._scale, scales=self._scales, sinks=self._sinks,
        )  # fmt: skip
