# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies beside ROCKETKV with small settings, and Hugging Face under the mask of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from reference import hf_policies, hf_rocketkv

from support.engine import BLOCK_SIZE
from support.masked import gaps_of, hf_model
from support.outside import LargeKeys
from support.policies import make_policy
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.snapkv import SnapKV
from vllm_sparse.policies.streamingllm import StreamingLLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_sparse.policies.protocol import Policy

SHAPE = {"head_dim": 32, "group_size": 4, "block_size": BLOCK_SIZE, "max_model_len": 1024}


class Case(NamedTuple):
    """A policy, its settings, and the run that Hugging Face's mask comes from."""

    kind: type[Policy]
    settings: dict[str, Any]
    run: Callable[[Policy, int], Any]

    @property
    def policy(self) -> Policy:
        return self.shaped()

    def shaped(self, **changes: Any) -> Policy:
        """With these changes of the shape."""
        return make_policy(self.kind, **{**SHAPE, **changes}, **self.settings)

    def limit(self, length: int) -> int:
        """Tokens that the same prompt finds in the prefix cache."""
        policy = self.policy
        if policy.moves:
            return policy.hittable_blocks(length) * BLOCK_SIZE
        return min(policy.publishable_tokens(length), length - 1) // BLOCK_SIZE * BLOCK_SIZE

    @property
    def name(self) -> str:
        return self.kind.__name__.upper()


CASES = [
    Case(
        Quest,
        {"token_budget": 64, "min_context": 128, "page_size": 8, "skip_layers": 1},
        lambda policy, length: hf_policies.Quest(length, 8, 64, 1),
    ),
    Case(
        SnapKV,
        {"token_budget": 96, "min_context": 128, "window": 8},
        lambda policy, length: hf_rocketkv._Run(
            length,
            length - policy.retention(length).dropped_blocks * policy.shape.block_size,
            {"window": 8, "kernel_size": 7, "sparse": True, "stage2": False},
        ),
    ),
    Case(
        StreamingLLM,
        {"token_budget": 96, "min_context": 128, "sinks": 4},
        lambda policy, length: hf_policies.StreamingLLM(length, 4, 96),
    ),
    Case(
        LargeKeys,
        {"token_budget": 128, "min_context": 128},
        lambda policy, length: hf_policies.LargeKeys(
            length, length - policy.retention(length).dropped_blocks * BLOCK_SIZE, 4, 32
        ),
    ),
]


def assert_tokens_of_hugging_face(
    case: Case, model: Path, prompts, tokens, *, stored=None, asked=None, **shape
) -> None:
    """Every request's tokens equal the masked Hugging Face run's, up to genuine near-ties.

    Args:
        case: The policy.
        model: Checkpoint.
        prompts: Token ids.
        tokens: Of each request.
        stored: See :func:`.hf_rocketkv.run_greedily`.
        asked: The same.
        **shape: Changes of the policy's shape.
    """
    policy, agreed = case.shaped(**shape), 0
    for prompt, got in zip(prompts, tokens, strict=True):
        assert policy.retention(len(prompt)).sparse
        expected = hf_rocketkv.run_greedily(
            hf_model(model), prompt, len(got), case.run(policy, len(prompt)), True, stored, asked
        )
        same = [a == b for a, b in zip(got, expected.tokens, strict=True)]
        first = same.index(False) if False in same else len(same)
        agreed += first
        if first < len(same):
            # float32 sums in another order: only a tie within rounding may fall the other way.
            gaps = [expected.margins[first], expected.prompt_gap, *expected.page_gaps[:first]]
            assert gaps[0] < 1e-4 or min(gaps[1:]) < 1e-5, f"diverges at token {first}: {gaps}"
    assert agreed > 0.9 * sum(map(len, tokens)), "near-ties may excuse few tokens only"


def gaps_to_hugging_face(case: Case, model: Path, prompts, tokens) -> torch.Tensor:
    """See :func:`.masked.gaps_to_hugging_face`."""
    gaps = []
    for prompt, got in zip(prompts, tokens, strict=True):
        run = case.run(case.policy, len(prompt))
        said = hf_rocketkv.run_greedily(hf_model(model), prompt, len(got), run, True, forced=got)
        gaps.append(gaps_of(said.logits, got))
    return torch.cat(gaps)
