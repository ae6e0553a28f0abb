# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Long prompts in a batch, without a server.

    python examples/offline.py "$(vllm-sparse fetch-model smollm2-135m-instruct)" docs/*.md

``--backend SPARDA`` and ``--settings '{"token_budget": 512}'`` as on vLLM's command line.
The pool of 1 GiB is for this small model: larger ones need more, or what vLLM takes unasked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def summarise(model: str, backend: str, settings: dict, documents: list[str]) -> list[str]:
    """What a model says each document is about."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        attention_backend=backend,
        additional_config={"vllm_sparse": settings},
        kv_cache_memory_bytes=1 << 30,
    )
    question = "\n\nSay in one sentence what this text is about."
    outputs = llm.chat(
        [[{"role": "user", "content": text + question}] for text in documents],
        SamplingParams(temperature=0.0, max_tokens=64),
    )
    return [output.outputs[0].text for output in outputs]


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Summarise long documents in a batch.")
    parser.add_argument("model")
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--backend", default="ROCKETKV")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--characters", type=int, default=20_000, help="of a document at most")
    options = parser.parse_args(arguments)
    texts = [path.read_text()[: options.characters] for path in options.documents]
    said = summarise(options.model, options.backend, options.settings, texts)
    for path, text in zip(options.documents, said, strict=True):
        print(f"{path}: {text.strip()}")


if __name__ == "__main__":
    main()
