# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a request says of its own sparsity, in the ``vllm_xargs`` of vLLM's API.

``extra_body={"vllm_xargs": {"vllm_sparse.sparse": False}}``. vLLM carries these arguments in the
request's sampling parameters into the scheduler and to the workers. There they are one number, its
*control*: what happens to a request is a pure function of its prompt length and that number, which
both processes evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX = "vllm_sparse."
SPARSE = f"{PREFIX}sparse"
TOKEN_BUDGET = f"{PREFIX}token_budget"

# Controls; any other is a token budget.
AS_SET = 0
DENSE = -1

# Why such a request is dense, for the counter.
REQUESTED = "requested"


@dataclass(frozen=True)
class Allowed:
    """What requests may ask of a server.

    Attributes:
        never_dense: Why they may not be dense, and what to do; empty if they may.
        never_budget: Why they may not bring a token budget, and what to do; empty if they may.
        most_tokens: The largest such budget.
        try_budget: Raises a ``ValueError`` for budgets that the backend cannot have.
    """

    never_dense: str = ""
    never_budget: str = ""
    most_tokens: int = 0
    try_budget: Callable[[int], Any] = int

    def check(self, extra_args: Mapping[str, Any] | None, goes_on: bool = False) -> None:
        """Refuse what a request asks for, if it cannot be had.

        Args:
            extra_args: Of its sampling parameters.
            goes_on: Its prompt comes in several parts, with outputs between them.

        Raises:
            RequestError: Says what, why, and what to do.
        """
        control = control_of(extra_args)
        if goes_on:
            raise RequestError(
                "sessions whose inputs are streamed cannot be had with sparse attention: what is "
                "kept follows from the prompt's length, which each input changes. Send the whole "
                "conversation as one prompt, or start the server without --attention-backend"
            )
        if control == DENSE and self.never_dense:
            raise RequestError(f"{SPARSE}: false cannot be had here: {self.never_dense}")
        if control > AS_SET:
            self._check_budget(control)

    def _check_budget(self, tokens: int) -> None:
        if self.never_budget:
            raise RequestError(f"{TOKEN_BUDGET} cannot be had here: {self.never_budget}")
        if tokens > self.most_tokens:
            raise RequestError(
                f"{TOKEN_BUDGET}: {tokens} is more than the {self.most_tokens} that this server "
                "allows. Ask for less, or start it with a larger vllm_sparse.max_token_budget"
            )
        try:
            self.try_budget(tokens)
        except ValueError as error:
            raise RequestError(str(error)) from None


def control_of(extra_args: Mapping[str, Any] | None) -> int:
    """What a request asks for.

    Args:
        extra_args: Of the request's sampling parameters; only names that begin as our package does
            are ours.

    Returns:
        :data:`AS_SET`, :data:`DENSE`, or a token budget.

    Raises:
        RequestError: An unknown name, a value that it cannot have, or a contradiction; says which.
    """
    ours = {name: value for name, value in (extra_args or {}).items() if is_ours(name)}
    for name in ours.keys() - {SPARSE, TOKEN_BUDGET}:
        raise RequestError(f"{name}: unknown; a request may set {SPARSE} and {TOKEN_BUDGET}")
    sparse, tokens = ours.get(SPARSE, True), ours.get(TOKEN_BUDGET, AS_SET)
    # JSON's true and false arrive as 1 and 0: vLLM's schema has no booleans.
    if type(sparse) not in (bool, int) or sparse not in (0, 1):
        raise RequestError(
            f"{SPARSE}: {sparse!r} is neither true nor false; false has this request read its "
            "whole context"
        )
    if TOKEN_BUDGET not in ours:
        return AS_SET if sparse else DENSE
    if type(tokens) is not int or not 0 < tokens < 1 << 31:
        raise RequestError(f"{TOKEN_BUDGET}: {tokens!r} is no number of tokens")
    if not sparse:
        raise RequestError(
            f"{SPARSE}: false and {TOKEN_BUDGET}: {tokens} contradict each other; leave one of "
            "them out"
        )
    return tokens


def is_ours(name: str) -> bool:
    """Whether an extra argument is meant for us, even if it is misspelt."""
    return str(name).replace("-", "_").lower().startswith("vllm_sparse")
