#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What conversations that take turns find cached when a pool is too small for all of them.

With and without `--kv-offloading-size`, in one process; prints a line of JSON: by turn, the tokens
of all prompts and those that were found, in the pool or in the tier. Stock vLLM's tier copies on
streams, which CPUs lack: here its scheduler's half works beside the copies that ours makes.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from decode_step import answer, engine_of, parser_of
from transformers import AutoConfig

if TYPE_CHECKING:
    import argparse


def main() -> None:
    """Command line entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--context", type=int, default=4096, help="first prompts, in tokens")
    parser.add_argument("--more", type=int, default=512, help="tokens that a turn adds")
    parser.add_argument("--holds", type=float, default=0.5, help="the pool, of all last prompts")
    parser.add_argument("--tier-gib", type=float, default=0.0)
    options = parser.parse_args()
    reply = 16
    longest = options.context + options.turns * (options.more + reply)
    shape = AutoConfig.from_pretrained(options.model)
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head
    pool = int(options.holds * options.conversations * longest * token)
    engine = engine_of(
        options, longest + 64, max_num_seqs=1, max_num_batched_tokens=2048,
        kv_cache_memory_bytes=pool, block_size=32, disable_log_stats=False, **_tier(options),
    )  # fmt: skip
    chance, vocab = random.Random(0), shape.vocab_size

    def text(length: int) -> list[int]:
        return [chance.randrange(vocab) for _ in range(length)]

    talks = [text(options.context) for _ in range(options.conversations)]
    turns = []
    for number in range(options.turns):
        asked = found = 0
        for place, prompt in enumerate(talks):
            last, _ = answer(engine, f"{number}-{place}", prompt, reply)
            asked, found = asked + len(prompt), found + last.num_cached_tokens
            talks[place] = [*prompt, *last.outputs[0].token_ids, *text(options.more)]
        turns.append({"tokens": asked, "found": found})
    print(json.dumps({"backend": options.backend, "tier_gib": options.tier_gib, "turns": turns}))


def _tier(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM that give it a tier."""
    if not options.tier_gib:
        return {}
    if options.backend != "stock":
        return {"kv_offloading_size": options.tier_gib}
    from vllm_sparse.backends.asked import TIER_MODULE

    return {
        "kv_transfer_config": {
            "kv_connector": "PrefixTierConnector", "kv_connector_module_path": TIER_MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(options.tier_gib * 2**30)},
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
