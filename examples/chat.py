# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A chat of several turns about a document, which every turn sends again.

    make serve   # or vllm serve MODEL --attention-backend ROCKETKV
    python examples/chat.py docs/decisions.md

Nothing is lost between turns: the conversation is read again, from the prefix cache where it
survived, and each turn chooses anew what its own question needs. Lines may come from a pipe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openai import OpenAI

if TYPE_CHECKING:
    from collections.abc import Iterable


def converse(client: OpenAI, model: str, document: str, lines: Iterable[str]) -> list[dict]:
    """Answers each line, with all that was said before.

    Returns:
        The conversation.
    """
    messages: list[dict] = [{"role": "system", "content": f"Answer from this text:\n{document}"}]
    for line in lines:
        messages.append({"role": "user", "content": line.strip()})
        reply = client.chat.completions.create(
            model=model, messages=messages, max_tokens=128, temperature=0.0
        )
        text = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        print(f"{text}\n({reply.usage.prompt_tokens} tokens of conversation)\n", flush=True)
    return messages


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Chat about a document.")
    parser.add_argument("document", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--characters", type=int, default=20_000, help="of the document at most")
    options = parser.parse_args(arguments)
    client = OpenAI(base_url=options.base_url, api_key="none")
    model = client.models.list().data[0].id
    converse(client, model, options.document.read_text()[: options.characters], sys.stdin)


if __name__ == "__main__":
    main()
