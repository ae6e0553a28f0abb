# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Conversations that grow by turns, through vLLM's real scheduler without a model: hits per turn.

What ``python -m benchmarks.replay`` serves, in steps instead of seconds: each agent asks again once
its reply is done, and all arms have pools of the same bytes. ``PYTHONPATH=tests python -m
support.agents MODEL`` prints the share of each turn's prompts that the prefix cache had.
"""

from __future__ import annotations

import argparse
from typing import Any

from support.scheduler import Machine

# Those of `rocketkv-512` and SmolLM2-135M, whose blocks are a quarter larger than stock's.
ROCKETKV = {
    "token_budget": 512, "min_context": 2048, "head_dim": 64, "group_size": 3,
    "window": 16, "generation_reserve": 256, "page_sizes": (4,),
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "stock": {"stock": True, "settings": {}},
    "keep_prefixes: false": {"settings": {**ROCKETKV, "keep_prefixes": False}},
    "ROCKETKV": {"settings": ROCKETKV},
}
DEFAULTS = {
    "agents": 4, "sessions": 1, "turns": 8, "start": 2048, "more": 768, "reply": 64, "blocks": 118,
}  # fmt: skip


def converse(options: argparse.Namespace, agent: int) -> Any:
    """The prompts of an agent, with their turns, one conversation after the other."""
    for session in range(options.sessions):
        text = [options.sessions * agent + session] * options.start
        for turn in range(options.turns):
            yield turn, text
            text = text + [turn] * options.more


def replay(machine: Machine, options: argparse.Namespace) -> list[tuple[int, int]]:
    """Let all agents work at once.

    Returns:
        Tokens from the prefix cache and tokens looked up, of each turn.
    """
    found = [[0, 0] for _ in range(options.turns)]
    left = [converse(options, agent) for agent in range(options.agents)]
    asked: list[Any] = [None] * options.agents
    while left:
        for place in reversed(range(len(left))):
            turn, request = asked[place] or (0, None)
            if request is not None and not request.is_finished():
                continue
            if request is not None:
                found[turn][0] += machine.first_hits[request.request_id]
                found[turn][1] += request.num_prompt_tokens
            if following := next(left[place], None):
                asked[place] = following[0], machine.add(following[1], options.reply)
            else:
                del left[place], asked[place]
        machine.step()
    machine.run()
    return [(hit, tokens) for hit, tokens in found]


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint, for its configuration")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    longest = options.start + (options.turns - 1) * options.more + options.reply
    for name, arm in ARMS.items():
        blocks = options.blocks if name == "stock" else options.blocks * 4 // 5
        machine = Machine(
            options.model, blocks=blocks + 1, ahead=1, block=128, max_model_len=longest,
            max_num_batched_tokens=2048, max_num_seqs=options.agents,
            scheduler_reserve_full_isl=True, stock=arm.get("stock", False),
            settings={**arm["settings"], "max_model_len": longest},
        )  # fmt: skip
        found = replay(machine, options)
        hits, tokens = map(sum, zip(*found, strict=True))
        turns = " ".join(f"{hit / all_:4.0%}" for hit, all_ in found)
        print(f"{name:20} {turns}  all {hits / tokens:4.0%}, {machine.preemptions} preemptions")


if __name__ == "__main__":
    main()
