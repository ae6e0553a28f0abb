# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tokens of engines with ROCKETKV against Hugging Face under the explicit mask."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from reference import hf_rocketkv

from support.engine import BLOCK_SIZE, SETTINGS
from support.policies import make_policy

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_sparse.policies.rocketkv import RocketKV


def policy_of(*, group_size: int = 4, head_dim: int = 32, **changes) -> RocketKV:
    """The policy that an engine has with ``SETTINGS`` and these changes."""
    own = {"block_size": BLOCK_SIZE, "window": 32, "max_model_len": 1024, **SETTINGS, **changes}
    return make_policy(head_dim=head_dim, group_size=group_size, **own)


@cache
def hf_model(path: Path):
    """A checkpoint in Hugging Face's library."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _said(model: Path, policy: RocketKV, prompt, count: int, *, evicts=True, **further):
    """What Hugging Face says under the mask of a policy; see :func:`.hf_rocketkv.generate`."""
    retention = policy.retention(len(prompt))
    assert retention.sparse
    settings = policy.settings
    return hf_rocketkv.generate(
        hf_model(model), prompt, count, dropped_blocks=retention.dropped_blocks * evicts,
        block_size=policy.shape.block_size, page_size=retention.page_size, top_r=retention.top_r,
        top_k=settings.token_budget // 2, window=settings.window, stage1=settings.stage1,
        stage2=settings.stage2, skip_layers=settings.skip_layers, return_logits=True, **further,
    )  # fmt: skip


def assert_tokens_of_hugging_face(
    model: Path, prompts, tokens, *, stored=None, asked=None, **changes
) -> None:
    """Every request's tokens equal the masked Hugging Face run's, up to genuine near-ties.

    Args:
        model: Checkpoint.
        prompts: Token ids.
        tokens: Of each request.
        stored: See :func:`.hf_rocketkv.run_greedily`.
        asked: The same.
        **changes: Of the settings, or of the policy's shape.
    """
    policy, agreed = policy_of(**changes), 0
    for prompt, got in zip(prompts, tokens, strict=True):
        expected = _said(model, policy, prompt, len(got), stored=stored, asked=asked)
        same = [a == b for a, b in zip(got, expected.tokens, strict=True)]
        first = same.index(False) if False in same else len(same)
        agreed += first
        if first < len(same):
            # float32 sums in another order: only a tie within rounding may fall the other way.
            gaps = [expected.margins[first], expected.prompt_gap]
            selection = [*expected.page_gaps[:first], *expected.channel_gaps[:first]]
            assert gaps[0] < 1e-4 or min([gaps[1], *selection]) < 1e-5, (
                f"diverges at token {first} without a near-tie: {gaps}, {min(selection)}"
            )
    assert agreed > 0.9 * sum(map(len, tokens)), "near-ties may excuse few tokens only"


def gaps_to_hugging_face(model: Path, prompts, tokens, *, sparse=True, **changes) -> torch.Tensor:
    """How far each token is from the one that Hugging Face, having said the same, would say.

    For models that vLLM runs in bfloat16 only, whose tokens rounding changes.

    Args:
        model: Checkpoint.
        prompts: Token ids.
        tokens: Of each request.
        sparse: With the mask.
        **changes: Of the settings, or of the policy's shape.

    Returns:
        The best logit minus the token's, float32 ``[all tokens]``.
    """
    policy, gaps = policy_of(**changes), []
    for prompt, got in zip(prompts, tokens, strict=True):
        said = _said(model, policy, prompt, len(got), evicts=sparse, sparse=sparse, forced=got)
        gaps.append(gaps_of(said.logits, got))
    return torch.cat(gaps)


def gaps_of(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The best logit minus the token's, of each row."""
    return logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
