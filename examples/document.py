# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Ask questions about a long document through the OpenAI API.

    make serve   # or vllm serve MODEL --attention-backend ROCKETKV
    python examples/document.py docs/decisions.md "Where do window queries wait?" "What is freed?"

The document comes first, so that later questions find it in the prefix cache.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from openai import OpenAI


def ask(client: OpenAI, model: str, document: str, question: str) -> tuple[str, float]:
    """An answer, and the seconds until its first token."""
    begin, first, parts = time.monotonic(), 0.0, []
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{document}\n\n{question}"}],
        max_tokens=128,
        temperature=0.0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - begin
            parts.append(chunk.choices[0].delta.content)
    return "".join(parts), first


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Ask questions about a long document.")
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--characters", type=int, default=20_000, help="of the document at most")
    options = parser.parse_args(arguments)
    client = OpenAI(base_url=options.base_url, api_key="none")
    model = client.models.list().data[0].id
    document = options.document.read_text()[: options.characters]
    for question in options.questions:
        answer, seconds = ask(client, model, document, question)
        print(f"> {question}\n{answer}\n({seconds:.1f} s to the first token)\n")


if __name__ == "__main__":
    main()
