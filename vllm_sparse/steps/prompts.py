# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompts of compressed requests: their window's queries wait, then they are compacted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.steps.rules import Rules


@dataclass(frozen=True)
class PromptEnd:
    """A prompt of a compressed request that is inside or past its window in this step.

    Attributes:
        blocks: Blocks up to the end of the prompt.
        prompt_len: P.
        dropped_blocks: Leading blocks that leave.
        shared_blocks: Leading blocks that others may share; queries wait behind them.
        page_size: Tokens per page.
        first_token: Batch position of the first window query in this step.
        last_token: Batch position after the last one.
        parked: Window queries that came in earlier steps.
        compacts: The step computes output too, so it compacts the prompt itself. Otherwise its
            window queries are parked, and the next step begins with compaction.
        sizes: ``prompt_len`` and ``dropped_blocks`` on the device, int32 ``[2]``.
    """

    blocks: Tensor
    prompt_len: int
    dropped_blocks: int
    shared_blocks: int
    page_size: int
    first_token: int
    last_token: int
    parked: int
    compacts: bool
    sizes: Tensor


class Prompts:
    """Finds the prompts of a batch that something happens to; only these are looped over.

    Args:
        policy: Decides from the prompt length.
        rules: What it decides.
        block_size: Tokens per block of the block table.
    """

    def __init__(self, policy: Policy, rules: Rules, block_size: int) -> None:
        self.policy = policy
        self.rules = rules
        self.block_size = block_size

    def ending(
        self,
        query_start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        rule: Tensor,
        block_table: Tensor,
        count: Callable[..., None],
    ) -> tuple[PromptEnd, ...]:
        """The prompts that are inside or past their window in this step, begun before its end.

        Args:
            query_start: Host ``[R + 1]``: where each row's tokens start in the batch.
            seq_lens: Host ``[R]``: tokens of each row after the step.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request.
            rule: Host ``[R]``: which rule of the table holds for each row.
            block_table: ``[R, max_blocks]`` on the device.
            count: Receives counter names and amounts.
        """
        start = seq_lens - query_start.diff()
        window_start = prompt_lens - max(self.policy.window, 1)
        ending = self.rules.table.sparse[rule] & (start < prompt_lens) & (seq_lens > window_start)
        prompts = []
        for r in ending.nonzero()[:, 0].tolist():
            prompt_len, first = int(prompt_lens[r]), int(start[r])
            last = int(seq_lens[r])
            shift = int(query_start[r]) - first
            begin = max(int(window_start[r]), first)
            tokens = begin + shift, min(last, prompt_len) + shift
            parked = begin - int(window_start[r])
            compacts = last > prompt_len
            prompts.append(
                self._prompt(int(rule[r]), prompt_len, block_table[r], tokens, parked, compacts)
            )
            if compacts:
                count("prompts_compacted", 1)
        return tuple(prompts)

    def begun(
        self,
        query_start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        controls: Tensor | None,
        block_table: Tensor,
        count: Callable[..., None],
    ) -> tuple[PromptEnd, ...]:
        """The prompts to compact before this step: it computes the first tokens behind them.

        That is exactly one step of each request that has such tokens, however it was chunked,
        unless a step computes both: no prefix hit reaches a prompt's end, and rejected drafts never
        take a request back to it.

        Args:
            query_start: Host ``[R + 1]``: where each row's tokens start in the batch.
            seq_lens: Host ``[R]``: tokens of each row after the step.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request; 0: nobody's.
            controls: What each row's request asks for, host ``[R]``; ``None`` if none does.
            block_table: ``[R, max_blocks]`` on the device.
            count: Receives counter names and amounts.
        """
        begun = (seq_lens - query_start.diff() == prompt_lens) & (prompt_lens > 0)
        if not self.policy.moves or not bool(begun.any()):
            return ()
        rule = self.rules.find_on_host(prompt_lens, controls)
        rows = (begun & self.rules.table.sparse[rule]).nonzero()[:, 0].tolist()
        if rows:
            count("prompts_compacted", len(rows))
        return tuple(
            self._prompt(int(rule[r]), int(prompt_lens[r]), block_table[r], (0, 0),
                         self.policy.window, True)
            for r in rows
        )  # fmt: skip

    def straddled(
        self,
        query_start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        controls: Tensor | None,
    ) -> bool:
        """Whether a prompt must be compacted in the midst of this step.

        A preempted request computes its first outputs with its prompt, in whatever chunks, which
        may be no longer than a step of drafts. Arguments: :meth:`begun`.
        """
        straddles = (seq_lens - query_start.diff() < prompt_lens) & (seq_lens > prompt_lens)
        if not self.policy.moves or not bool(straddles.any()):
            return False
        rule = self.rules.find_on_host(prompt_lens, controls)
        return bool((straddles & self.rules.table.sparse[rule]).any())

    def _prompt(
        self,
        rule: int,
        prompt_len: int,
        blocks: Tensor,
        tokens: tuple[int, int],
        parked: int,
        compacts: bool,
    ) -> PromptEnd:
        table = self.rules.table
        dropped = int(table.dropped[rule])
        sizes = torch.tensor([prompt_len, dropped], dtype=torch.int32)
        return PromptEnd(
            blocks=blocks[: -(-prompt_len // self.block_size)],
            prompt_len=prompt_len,
            dropped_blocks=dropped,
            shared_blocks=int(table.shared[rule]),
            page_size=int(table.page_size[rule]),
            first_token=tokens[0],
            last_token=tokens[1],
            parked=parked,
            compacts=compacts,
            sizes=upload(sizes, blocks.device),
        )

    def count(
        self,
        query_start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        rule: Tensor,
        count: Callable[..., None],
        replayed: Tensor | None = None,
    ) -> None:
        """Count each request once, in the step that completes its prompt, by how it is served.

        Args:
            query_start: Host ``[R + 1]``: where each row's tokens start in the batch.
            seq_lens: Host ``[R]``: tokens of each row after the step.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request.
            rule: Host ``[R]``: which rule of the table holds for each row.
            count: Receives counter names, amounts and reasons.
            replayed: Host bool ``[R]``: rows of requests that were preempted with outputs. A chunk
                of their replay may end with the prompt, or go on behind it. ``None`` where nobody
                tells: then only steps that end with a prompt count.
        """
        ends = seq_lens - query_start.diff() < prompt_lens
        if replayed is None:
            ends &= seq_lens == prompt_lens
        else:  # vLLM may put a prompt's last token and room for drafts into one step
            ends &= (seq_lens >= prompt_lens) & ~replayed
        finished = rule[ends]
        if not len(finished):
            return
        sparse = self.rules.table.sparse[finished]
        if amount := int(sparse.sum()):
            count("requests", amount)
        reasons = Counter(self.rules.reasons[n] for n in finished[~sparse].tolist())
        for reason, amount in reasons.items():
            count("dense_fallbacks", amount, reason)
