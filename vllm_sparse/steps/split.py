# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one step asks of each layer: which tokens are dense, sparse, or finish their prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.control import AS_SET
from vllm_sparse.steps.prompts import PromptEnd, Prompts
from vllm_sparse.steps.rules import Rules, Table
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


class _Batch(NamedTuple):
    """A step on the host: of its ``R`` rows what `split` is given, and of its ``T`` tokens ``row``
    and ``position`` in their requests.
    """

    query_start: Tensor
    seq_lens: Tensor
    prompt_lens: Tensor
    rule: Tensor
    row: Tensor
    position: Tensor


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
            controls: What each row's request asks for, host ``[R]``; ``None`` if none does.
            drafts: How far ``seq_lens`` may be off.
            replayed: Host bool ``[R]``: rows of requests that were preempted with outputs;
                ``None`` where nobody tells.

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
        sparse_row = self.rules.table.sparse[rule]
        any_sparse = bool(sparse_row.any())
        whole_batch = partial(dense_metadata, None, None, None)
        rows = query_start, seq_lens, prompt_lens, rule
        if not any_sparse and self.policy.moves:
            self.prompts.count(*rows, count, replayed)
            return StepMetadata(num_tokens, whole_batch())
        row = torch.repeat_interleave(
            torch.arange(len(seq_lens)), query_start.diff(), output_size=num_tokens
        )
        end = query_start[1:][row]
        batch = _Batch(*rows, row, torch.arange(num_tokens) - end + seq_lens[row])
        sparse_token = sparse_row[row] & (batch.position >= prompt_lens[row])

        dense, dense_index = None, None
        prompts: tuple[PromptEnd, ...] = ()
        if not bool(sparse_token.all()):
            self.prompts.count(*rows, count, replayed)
            if self.policy.moves:
                prompts = self.prompts.ending(*rows, block_table, count)
            if bool(sparse_token.any()):
                dense_index = (~sparse_token).nonzero()[:, 0]
                dense_rows = torch.unique_consecutive(row[dense_index])
                lens = torch.where(sparse_row, torch.minimum(seq_lens, prompt_lens), seq_lens)
                dense = dense_metadata(dense_rows, dense_index, lens[dense_rows])
                dense_index = upload(dense_index, block_table.device)
            else:
                dense = whole_batch()
        groups: tuple[SparseRows, ...] = ()
        if any_sparse:
            groups = tuple(self._groups(batch, sparse_token, block_table, count, controls, drafts))
        pages = None
        if not self.policy.moves:
            reads_all = bool(groups) and self.policy.settings.skip_layers > 0
            pages = self._pages(
                batch, slots[:num_tokens], whole_batch if reads_all else None, drafts
            )
        return StepMetadata(num_tokens, dense, dense_index, prompts, groups, pages)

    def _groups(
        self,
        batch: _Batch,
        sparse_token: Tensor,
        block_table: Tensor,
        count: Callable[..., None],
        controls: Tensor | None,
        drafts: Drafts | None,
    ) -> Iterator[SparseRows]:
        """Sparse tokens, by the size of their pages and by what their requests ask for."""
        table, rule, row = self.rules.table, batch.rule, batch.row
        page_sizes = table.page_size[rule]
        asked = [AS_SET] if controls is None else controls[table.sparse[rule]].unique().tolist()
        for page_size, control in product(self.policy.page_sizes, asked):
            chosen = sparse_token & (page_sizes[row] == page_size)
            if controls is not None:
                chosen &= (controls == control)[row]
            whole = bool(chosen.all())
            index = torch.arange(len(row)) if whole else chosen.nonzero()[:, 0]
            if not len(index):
                continue
            group = self._group(batch, index, block_table, count, page_size, control, drafts)
            if not whole:
                yield replace(group, token_index=upload(index, block_table.device))
                continue
            yield group
            if drafts is None and len(row) == len(rule) and self.policy.moves:
                self._steady = _Steady(
                    batch.query_start.clone(), table, rule,
                    table.dropped[rule], group.top_r, page_size, control,
                )  # fmt: skip

    def _group(
        self,
        batch: _Batch,
        index: Tensor,
        block_table: Tensor,
        count: Callable[..., None],
        page_size: int,
        control: int,
        drafts: Drafts | None,
    ) -> SparseRows:
        """Sparse tokens at some positions of the batch."""
        device, rows = block_table.device, batch.row[index]
        rule = batch.rule[rows]
        dropped = self.rules.table.dropped[rule]
        gone = dropped * self.block_size
        visible = batch.position[index] + 1
        lengths = (visible - gone).int()
        there = upload(rows, device)
        columns = self._columns(dropped, lengths, block_table)
        held, final = upload(lengths, device), upload((batch.seq_lens[rows] - gone).int(), device)
        if drafts is None:
            self._count_rows(visible, lengths, control, count)
        else:
            off = drafts.off[there]
            held, final = held + off, final + off
            policy = self.rules.policy_for(control)
            drafts.count_rows(upload(visible, device) + off, held, policy)
        return SparseRows(
            None,
            block_table[there[:, None], columns],
            held,
            final,
            upload(self.rules.table.top_r[rule], device),
            page_size,
            control,
        )

    def _columns(self, dropped: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        """Columns of the block table that rows hold, on its device, int64 ``[T, max_blocks]``.

        Made there: on the way they would be as many numbers as the longest row has blocks, for each
        of a thousand rows.
        """
        device, width = block_table.device, -(-int(lengths.max()) // self.block_size)
        first = upload(dropped.long(), device)[:, None]
        columns = first + torch.arange(width, device=device)
        return columns.clamp_(max=block_table.shape[1] - 1)

    def _pages(
        self,
        batch: _Batch,
        slots: Tensor,
        whole: Callable[[], Any] | None,
        drafts: Drafts | None,
    ) -> Pages:
        """What a step writes where tokens stay in place."""
        device, row, position = slots.device, batch.row, batch.position
        size = self.policy.page_sizes[0]
        last = torch.arange(len(row)) == (batch.query_start[1:] - 1)[row]
        if drafts is not None:
            position = upload(position, device) + drafts.off[upload(row, device)]
            closes = ((position + 1) % size == 0) | upload(last, device)
            # The others go to vLLM's null block.
            closing = torch.where(closes, slots, 0)
        else:
            closes = ((position + 1) % size == 0) | last
            closing = slots[upload(closes.nonzero()[:, 0], device)]
        return Pages(
            slots, closing if self.policy.index_width else slots[:0], whole() if whole else None
        )

    def _next(
        self, steady: _Steady, seq_lens: Tensor, block_table: Tensor, count: Callable[..., None]
    ) -> StepMetadata:
        """The plan of the rows of the step before, each of which decodes one token again."""
        device = block_table.device
        lengths = (seq_lens - steady.dropped * self.block_size).int()
        columns = self._columns(steady.dropped, lengths, block_table)
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
