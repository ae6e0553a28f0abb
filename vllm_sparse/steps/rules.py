# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What happens to each row's request, as a table: the policy is a Python function of integers."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.control import AS_SET, DENSE
from vllm_sparse.policies.controlled import policy_for

if TYPE_CHECKING:
    from vllm_sparse.policies.protocol import Policy

# Rules kept for pairs of a budget and a prompt length; more than requests run at once.
_MOST_BUDGETS = 4096


class Table(NamedTuple):
    """Columns, of which each row is a rule.

    Attributes:
        sparse: Whether requests are served sparsely, bool.
        dropped: Leading blocks that leave, int32 like the rest.
        page_size: Tokens per page.
        top_r: Channels that page scores read.
        shared: Leading blocks that are not private.
    """

    sparse: Tensor
    dropped: Tensor
    page_size: Tensor
    top_r: Tensor
    shared: Tensor


class Rules:
    """A rule for each prompt length, one to be dense, and those of budgets that requests bring.

    Args:
        policy: Decides from the prompt length.
        parts: Blocks of the block table for each block of the policy's.

    Attributes:
        table: The rules; another object if some were added.
        reasons: Why requests under a rule are dense; empty where they are not.
        policy_for: The policy for requests with a control.
    """

    def __init__(self, policy: Policy, parts: int = 1) -> None:
        self._parts = parts
        self.policy_for = lru_cache(_MOST_BUDGETS)(partial(policy_for, policy))
        self._longest = policy.shape.max_model_len
        cases = [(AS_SET, length) for length in range(self._longest + 1)]
        self._fixed, self.reasons = self._tabulate([*cases, (DENSE, 0)])
        self.table = self._fixed
        self._budgets: dict[tuple[int, int], int] = {}

    @property
    def on_device(self) -> Tensor:
        """Dropped blocks, channels to read or 0 if dense, shared blocks; without budgets.

        Returns:
            int32 ``[rules, 3]``, for :func:`vllm_sparse.kernels.reference.rows.plan_rows`.
        """
        table = self._fixed
        top_r = torch.where(table.sparse, table.top_r.clamp(min=1), 0)
        return torch.stack((table.dropped, top_r.int(), table.shared), 1)

    def find(self, prompt_lens: Tensor, controls: Tensor | None) -> Tensor:
        """Which rule holds for each row; wherever the tensors are, without budgets.

        Args:
            prompt_lens: Prompt tokens of each row's request, ``[R]``.
            controls: What each row's request asks for, ``[R]``; ``None`` if none does, see
                :mod:`vllm_sparse.control`.

        Returns:
            int64 ``[R]``.
        """
        known = prompt_lens.clamp(max=self._longest).long()
        if controls is None:
            return known
        return torch.where(controls == DENSE, self._longest + 1, known)

    def find_on_host(self, prompt_lens: Tensor, controls: Tensor | None) -> Tensor:
        """Which rule holds for each row, with budgets, whose rules are made when first needed.

        Args:
            prompt_lens: Prompt tokens of each row's request, host ``[R]``.
            controls: What each row's request asks for, host ``[R]``; ``None`` if none does.

        Returns:
            Host int64 ``[R]``.
        """
        found = self.find(prompt_lens, controls)
        if controls is None:
            return found
        rows = (controls > AS_SET).nonzero()[:, 0].tolist()
        if len(self._budgets) + len(rows) > _MOST_BUDGETS:
            self.table, self._budgets = self._fixed, {}
            del self.reasons[self._longest + 2 :]
        for row in rows:
            case = int(controls[row]), int(found[row])
            if case not in self._budgets:
                self._budgets[case] = len(self.reasons)
                added, reasons = self._tabulate([case])
                pairs = zip(self.table, added, strict=True)
                self.table = Table(*map(torch.cat, pairs))
                self.reasons += reasons
            found[row] = self._budgets[case]
        return found

    def _tabulate(self, cases: list[tuple[int, int]]) -> tuple[Table, list[str]]:
        """Rules for pairs of a control and a prompt length."""
        sparse, numbers, reasons = [], [], []
        for control, length in cases:
            policy = self.policy_for(control)
            rule = policy.retention(length)
            shared = policy.shared_blocks(length, rule.dropped_blocks) if rule.sparse else 0
            sparse.append(rule.sparse)
            dropped, shared = rule.dropped_blocks * self._parts, shared * self._parts
            numbers.append((dropped, rule.page_size, rule.top_r, shared))
            reasons.append(rule.reason)
        return Table(torch.tensor(sparse), *torch.tensor(numbers).int().unbind(1)), reasons
