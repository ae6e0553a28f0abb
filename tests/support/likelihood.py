# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What stock vLLM thinks of texts that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def serve(job: dict[str, Any]) -> None:
    """Does what a job says, for :func:`support.forked.run_forked`.

    Args:
        job: ``llm`` (arguments of ``LLM``), ``prompts``, ``texts`` (token ids that follow each) and
            ``result``, a file that gets, for each token of each text, how much less likely it was
            than the likeliest one, in nats.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, dtype="float32", seed=0, **job["llm"])
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    gaps = []
    for prompt, text in zip(job["prompts"], job["texts"], strict=True):
        (output,) = llm.generate({"prompt_token_ids": prompt + text}, params, use_tqdm=False)
        rows = output.prompt_logprobs[len(prompt) :]
        gaps.append(
            [
                max(each.logprob for each in row.values()) - row[token].logprob
                for token, row in zip(text, rows, strict=True)
            ]
        )
    Path(job["result"]).write_text(json.dumps(gaps))
