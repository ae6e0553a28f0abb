# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the host does not know of a step where drafts are served."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_sparse.policies.protocol import Policy


class Drafts(NamedTuple):
    """How long rows really are, on the device.

    Attributes:
        off: What must be added to each row's length: rejected drafts are still counted on the host
            where the request decodes, never before its prompt's end. int32 ``[R]``.
        counted: int64 ``[3]``, added to: sparse rows, their visible and their selected tokens.
    """

    off: Tensor
    counted: Tensor

    def count_rows(self, visible: Tensor, lengths: Tensor, policy: Policy) -> None:
        """Count sparse rows.

        Args:
            visible: Tokens that each would see densely, ``[T]``.
            lengths: Tokens that each holds, ``[T]``.
            policy: Says how many of these are read.
        """
        read = lengths.clamp(max=policy.top_k or policy.shape.max_model_len)
        self.counted[0] += len(lengths)
        self.counted[1] += visible.sum()
        self.counted[2] += read.sum()
