# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A drafter that knows the answers and now and then says something else."""

from __future__ import annotations

from typing import Any

LONGEST_DRAFT = 5


def speculation(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    """Arguments of ``LLM`` that let the oracle draft.

    Args:
        prompts: Token ids.
        answers: What the model generates for each.
    """
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    drafter = {"model": "support.oracle.Oracle", "method": "custom_class"}
    return {
        "additional_config": {"oracle": whole},
        "speculative_config": {**drafter, "num_speculative_tokens": LONGEST_DRAFT},
    }


class Oracle:
    """Drafts of up to five tokens, unlike ones for the rows of a batch; half of them go wrong.

    Args:
        config: vLLM's configuration.
    """

    def __init__(self, config: Any) -> None:
        self._whole = config.additional_config["oracle"]

    def load_model(self, target: Any) -> None:
        """Nothing to load."""

    def propose(
        self, sampled: list[list[int]], num_tokens: Any, token_ids: Any, **_: Any
    ) -> list[list[int]]:
        """Drafts of every row; none for rows that are still in their prompt.

        Args:
            sampled: Tokens that the step has sampled for each row.
            num_tokens: Tokens of each row.
            token_ids: All tokens of each row, padded.
        """
        drafts = []
        for row, new in enumerate(sampled):
            count = int(num_tokens[row])
            known = token_ids[row, :count].tolist()
            whole = next((text for text in self._whole if text[:count] == known), None)
            draft = whole[count : count + (count + row) % (LONGEST_DRAFT + 1)] if whole else []
            if draft and count % 2:
                wrong = count // 2 % len(draft)
                draft[wrong] = (draft[wrong] + 1) % 1024
            drafts.append(draft if new else [])
        return drafts
