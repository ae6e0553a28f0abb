#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Times two turns of a conversation: what the second finds in the prefix cache, and what it costs.

Random prompts, eager, in one process; prints a line of JSON for each conversation, with the CPU
time of a turn's first steps: the first is the prompt, the second begins with compaction. Run it
with each backend, in turns.
"""

from __future__ import annotations

import json
import random

from decode_step import answer, engine_of, parser_of


def main() -> None:
    """Command line entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--context", type=int, default=4096, help="first prompt, in tokens")
    parser.add_argument("--reply", type=int, default=12, help="tokens generated in a turn")
    parser.add_argument("--more", type=int, default=256, help="tokens that the second turn adds")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    longest = options.context + options.more + 2 * options.reply + 64
    engine = engine_of(
        options, longest, max_num_seqs=2, max_num_batched_tokens=longest,
        kv_cache_memory_bytes=1 << 30,
    )  # fmt: skip

    def turn(name: str, prompt: list[int]) -> tuple[dict, list[int]]:
        found, steps = answer(engine, name, prompt, options.reply)
        shown = {"prompt": len(prompt), "cached": found.num_cached_tokens, "cpu_ms": steps[:3]}
        return shown, list(found.outputs[0].token_ids)

    chance = random.Random(0)
    for number in range(-1, options.rounds):  # the first one warms up
        prompt = [chance.randrange(1000, 20000) for _ in range(options.context)]
        first, reply = turn(f"{number}-1", prompt)
        further = [chance.randrange(1000, 20000) for _ in range(options.more)]
        second, _ = turn(f"{number}-2", [*prompt, *reply, *further])
        if number >= 0:
            shown = {"backend": options.backend, "settings": options.settings}
            print(json.dumps({**shown, "first": first, "second": second}), flush=True)


if __name__ == "__main__":
    main()
