# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one step asks of each layer: which tokens are dense, sparse, or finish their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.control import AS_SET
from vllm_sparse.steps.prompts import PromptEnd, Prompts
from vllm_sparse.steps.rules import Rules, Table
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.kernels.types import Rows
    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.steps.drafts import Drafts


@dataclass(frozen=True)
class SparseRows:
    """Decode tokens of one page size.

    Attributes:
        token_index: Positions in the batch, ``[T]``; ``None`` if they are the whole batch.
        block_table: Physical blocks from the first kept one, int32 ``[T, max_blocks]``.
        lengths: Physical tokens up to and including each row's own, int32 ``[T]``.
        final_lengths: Physical tokens of the row's request after this step, int32 ``[T]``.
        top_r: Channels to read, int32 ``[T]``.
        page_size: Tokens per page.
        control: What their requests ask for, which is the same.
    """

    token_index: Tensor | None
    block_table: Tensor
    lengths: Tensor
    final_lengths: Tensor
    top_r: Tensor
    page_size: int
    control: int = AS_SET


@dataclass(frozen=True)
class Pages:
    """What a step writes where tokens stay in place.

    Attributes:
        slots: ``block * block_size + offset`` of every token, int64 ``[T]``.
        closing: Slots of the last token that the step writes to each page of the index, int64
            ``[n]``.
        whole: Metadata of the stock backend for the whole batch, for layers that read everything;
            ``None`` if there are none, or no sparse tokens.
    """

    slots: Tensor
    closing: Tensor
    whole: Any | None


@dataclass(frozen=True)
class StepMetadata:
    """Metadata of one step, shared by all layers of a KV cache group.

    Attributes:
        num_tokens: Tokens in the batch.
        dense: Metadata of the stock backend for the dense tokens; ``None`` if there are none.
        dense_index: Their batch positions; ``None`` if they are the whole batch.
        prompts: Prompts whose window queries to park, or to compact in the midst of the step.
        sparse: Sparse decode tokens by page size.
        pages: Set if tokens stay in place.
        rows: Set on a GPU if no request brings more tokens than drafts and one; then there is
            nothing else.
    """

    num_tokens: int
    dense: Any | None
    dense_index: Tensor | None = None
    prompts: tuple[PromptEnd, ...] = ()
    sparse: tuple[SparseRows, ...] = ()
    pages: Pages | None = None
    rows: Rows | None = None


class _Steady(NamedTuple):
    """What does not change while the same rows decode one token a step."""

    query_start: Tensor
    table: Table
    rule: Tensor
    dropped: Tensor
    top_r: Tensor
    page_size: int
    control: int


class StepPlanner:
    """Splits a batch as the policy says.

    Args:
        policy: Decides from the prompt length.
        block_size: Tokens per block of the block table; the policy's blocks may be several.

    Attributes:
        rules: What it decides.
        prompts: Finds those that end.
    """

    def __init__(self, policy: Policy, block_size: int | None = None) -> None:
        self.policy = policy
        self.block_size = block_size or policy.shape.block_size
        self.rules = Rules(policy, policy.shape.block_size // self.block_size)
        self.prompts = Prompts(policy, self.rules, self.block_size)
        self._steady: _Steady | None = None

    def split(
        self,
        query_start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        block_table: Tensor,
        slots: Tensor,
        dense_metadata: Callable[[Tensor | None, Tensor | None, Tensor | None], Any],
        count: Callable[..., None],
        controls: Tensor | None = None,
        drafts: Drafts | None = None,
        replayed: Tensor | None = None,
    ) -> StepMetadata:
        """Plan one step.

        Args:
            query_start: Host ``[R + 1]``: where each row's tokens start in the batch.
            seq_lens: Host ``[R]``: tokens of each row after the step.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request.
            block_table: ``[R, max_blocks]`` on the device.
            slots: ``block * block_size + offset`` of every token, ``[T]`` on the device.
            dense_metadata: Called with the rows, token positions and sequence lengths of the dense
                part (``None`` thrice: the whole batch as it is).
            count: Receives counter names and amounts.
            controls: As of :meth:`.Rules.find`.
            drafts: How far ``seq_lens`` may be off.
            replayed: As of :meth:`.Prompts.count`.

        Returns:
            The metadata.
        """
        steady, rule = self._steady, self.rules.find_on_host(prompt_lens, controls)
        if (
            steady is not None
            and steady.table is self.rules.table
            and torch.equal(rule, steady.rule)
            and torch.equal(query_start, steady.query_start)
            and bool((seq_lens > prompt_lens).all())
        ):
            return self._next(steady, seq_lens, block_table, count)
        self._steady = None
        num_tokens = int(query_start[-1])
        query_lens = query_start.diff()
        sparse_row = self.rules.table.sparse[rule]
        any_sparse = bool(sparse_row.any())
        if not any_sparse and self.policy.moves:
            self.prompts.count(query_start, seq_lens, prompt_lens, rule, count, replayed)
            return StepMetadata(num_tokens, dense_metadata(None, None, None))

        device = block_table.device
        start = seq_lens - query_lens
        row = torch.repeat_interleave(
            torch.arange(len(seq_lens)), query_lens, output_size=num_tokens
        )
        position = torch.arange(num_tokens) - query_start[:-1][row] + start[row]
        sparse_token = sparse_row[row] & (position >= prompt_lens[row])

        dense, dense_index = None, None
        prompts: tuple[PromptEnd, ...] = ()
        all_sparse = bool(sparse_token.all())
        if not all_sparse:
            self.prompts.count(query_start, seq_lens, prompt_lens, rule, count, replayed)
            if self.policy.moves:
                prompts = self.prompts.ending(
                    query_start, seq_lens, prompt_lens, rule, block_table, count
                )
            if bool(sparse_token.any()):
                dense_index = (~sparse_token).nonzero()[:, 0]
                rows = torch.unique_consecutive(row[dense_index])
                lens = torch.where(sparse_row, torch.minimum(seq_lens, prompt_lens), seq_lens)
                dense = dense_metadata(rows, dense_index, lens[rows])
                dense_index = upload(dense_index, device)
            else:
                dense = dense_metadata(None, None, None)

        groups = []
        page_sizes = self.rules.table.page_size[rule]
        asked = [AS_SET] if controls is None else controls[sparse_row].unique().tolist()
        for page_size, control in product(self.policy.page_sizes, asked) if any_sparse else ():
            chosen = sparse_token & (page_sizes[row] == page_size)
            if controls is not None:
                chosen &= (controls == control)[row]
            whole = bool(chosen.all())
            index = torch.arange(num_tokens) if whole else chosen.nonzero()[:, 0]
            if not len(index):
                continue
            rows = row[index]
            dropped = self.rules.table.dropped[rule][rows]
            gone = dropped * self.block_size
            visible, lengths = position[index] + 1, (position[index] + 1 - gone).int()
            width = -(-int(lengths.max()) // self.block_size)
            columns = (dropped[:, None] + torch.arange(width)).clamp_(max=block_table.shape[1] - 1)
            there = upload(rows, device)
            held, final = upload(lengths, device), upload((seq_lens[rows] - gone).int(), device)
            if drafts is not None:
                off = drafts.off[there]
                held, final = held + off, final + off
            groups.append(
                SparseRows(
                    None if whole else upload(index, device),
                    block_table[there[:, None], upload(columns, device)],
                    held,
                    final,
                    upload(self.rules.table.top_r[rule][rows], device),
                    page_size,
                    control,
                )
            )
            if drafts is None:
                self._count_rows(visible, lengths, control, count)
            else:
                policy = self.rules.policy_for(control)
                drafts.count_rows(upload(visible, device) + off, held, policy)
            lone = drafts is None and num_tokens == len(seq_lens)
            if lone and whole and self.policy.moves:
                self._steady = _Steady(
                    query_start.clone(), self.rules.table, rule,
                    dropped, groups[-1].top_r, page_size, control,
                )  # fmt: skip
        pages = None
        if not self.policy.moves:
            size = self.policy.page_sizes[0]
            last = torch.arange(num_tokens) == (query_start[1:] - 1)[row]
            slots = slots[:num_tokens]
            if drafts is not None:
                position = upload(position, device) + drafts.off[upload(row, device)]
                closes = ((position + 1) % size == 0) | upload(last, device)
                # The others go to vLLM's null block.
                closing = torch.where(closes, slots, 0)
            else:
                closes = ((position + 1) % size == 0) | last
                closing = slots[upload(closes.nonzero()[:, 0], device)]
            reads_all = bool(groups) and self.policy.settings.skip_layers > 0
            pages = Pages(
                slots,
                closing if self.policy.index_width else slots[:0],
                dense_metadata(None, None, None) if reads_all else None,
            )
        return StepMetadata(num_tokens, dense, dense_index, prompts, tuple(groups), pages)

    def _next(
        self, steady: _Steady, seq_lens: Tensor, block_table: Tensor, count: Callable[..., None]
    ) -> StepMetadata:
        """The plan of the rows of the step before, each of which decodes one token again."""
        device = block_table.device
        lengths = (seq_lens - steady.dropped * self.block_size).int()
        width = -(-int(lengths.max()) // self.block_size)
        columns = steady.dropped[:, None].long() + torch.arange(width)
        columns = upload(columns.clamp_(max=block_table.shape[1] - 1), device)
        self._count_rows(seq_lens, lengths, steady.control, count)
        lengths, table = upload(lengths, device), block_table.gather(1, columns)
        kind = steady.top_r, steady.page_size, steady.control
        rows = SparseRows(None, table, lengths, lengths, *kind)
        return StepMetadata(len(seq_lens), None, sparse=(rows,))

    def _count_rows(
        self, visible: Tensor, lengths: Tensor, control: int, count: Callable[..., None]
    ) -> None:
        """Count decode rows by the tokens that they would see densely, and those that they hold."""
        top_k = self.rules.policy_for(control).top_k
        read = lengths if top_k is None else lengths.clamp(max=top_k)
        count("decode_rows", len(lengths))
        count("visible_tokens", int(visible.sum()))
        count("selected_tokens", int(read.sum()))
