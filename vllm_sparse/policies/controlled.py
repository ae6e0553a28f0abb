# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The policy for a request that asks for something of its own."""

from __future__ import annotations

from dataclasses import replace

from vllm_sparse.config import NAMESPACE, validated
from vllm_sparse.control import AS_SET, DENSE, REQUESTED
from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention


class Dense(Policy):
    """Nothing leaves, everything is read, and everything may be shared."""

    def retention(self, prompt_len: int) -> Retention:
        """Dense, however long the prompt is."""
        return Retention(False, reason=REQUESTED)


def policy_for(policy: Policy, control: int) -> Policy:
    """The policy for requests with a control.

    Args:
        policy: As the server's settings have it.
        control: See :mod:`vllm_sparse.control`.
    """
    if control == AS_SET:
        return policy
    if control == DENSE:
        return Dense(policy.settings, policy.shape)
    # Checked when the request came in; the scheduler asks in every step.
    return replace(policy, settings=policy.settings.model_copy(update={"token_budget": control}))


def with_budget(settings: PolicySettings, tokens: int) -> PolicySettings:
    """The settings of a request that brings a token budget.

    Raises:
        ConfigError: The budget does not go with the other settings.
    """
    values = {**settings.model_dump(), "token_budget": tokens}
    return validated(type(settings), values, NAMESPACE)
