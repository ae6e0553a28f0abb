# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""An agent's day: conversations that grow by tool results, against `vllm serve`, arms in turns.

Each agent starts from an instruction of its own, asks, gets a reply of fixed length, adds a tool's
result (prose) to the conversation and asks again: the pattern of coding agents, whose prompts are
nearly all in the prefix cache. Several agents work at once. Measured per turn: seconds to the first
token and per further token, tokens that the prefix cache had, and what the server's gauges say.
All arms see the same conversations: replies are not fed back, the tool's results are.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, corpus, harness, tables
from benchmarks.results import Recorder
from benchmarks.servers import SERVED, Watch, add_options, in_turns, server_of
from vllm_sparse.demo.server import ServerError

if TYPE_CHECKING:
    from openai import OpenAI

QUICK = {"turns": 3, "agents": 1, "start": 512, "result": 256, "reply": 8}


def ask(client: OpenAI, prompt: list[int], reply: int) -> dict[str, Any]:
    """One turn: milliseconds to the first token and per further token.

    Args:
        client: Of the server.
        prompt: The whole conversation, as tokens.
        reply: Tokens to generate.
    """
    began, times, usage = time.perf_counter(), [], None
    for chunk in client.completions.create(
        model=SERVED, prompt=prompt, max_tokens=reply, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    ):  # fmt: skip
        if chunk.choices:
            times.append(time.perf_counter())
        usage = chunk.usage or usage
    if usage is None or usage.completion_tokens != reply:
        raise RuntimeError(f"the server generated {usage} instead of {reply} tokens")
    further = (times[-1] - times[0]) / (reply - 1) if reply > 1 else 0.0
    return {
        "prompt_tokens": usage.prompt_tokens,
        "ttft_ms": 1e3 * (times[0] - began),
        "tpot_ms": 1e3 * further,
    }


def converse(client: OpenAI, text: list[int], options: Any) -> list[dict[str, Any]]:
    """All turns of one agent."""
    ends = [options.start + turn * options.result for turn in range(options.turns)]
    return [{"turn": n, **ask(client, text[:end], options.reply)} for n, end in enumerate(ends)]


def measure(arm: arms.Arm, texts: list[list[int]], options: Any) -> dict[str, Any]:
    """Lets all agents work against a server of one arm."""
    from openai import OpenAI

    model = harness.resolve_model(options.model)
    with (
        tempfile.TemporaryDirectory(prefix="vllm-sparse-") as folder,
        server_of(
            *(arm, model, options.context, options.pool_tokens, Path(folder, "log")),
            *("--max-num-seqs", str(options.agents), "--enforce-eager", *options.server_arg),
        ) as server,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1800, max_retries=0)
        ask(client, list(range(100, 200)), 2)  # what is only done once
        began = time.perf_counter()
        with Watch(server) as watch, ThreadPoolExecutor(options.agents) as pool:
            turns = list(pool.map(lambda text: converse(client, text, options), texts))
        return {"seconds": time.perf_counter() - began, "agents": turns, **watch.found()}


def runs(result: dict[str, Any]) -> str:
    """A table with a row per arm and round: first turns, later turns, the whole."""

    def middle(run: dict[str, Any], key: str, first: bool) -> float:
        turns = [t for agent in run["agents"] for t in agent if (t["turn"] == 0) == first]
        return statistics.median(t[key] for t in turns)

    columns: tables.Columns = {
        "arm": "arm",
        "all done after, s": "{seconds:.0f}",
        "TTFT of first turns, s": lambda r: f"{middle(r, 'ttft_ms', True) / 1e3:.1f}",
        "of later turns, s": lambda r: f"{middle(r, 'ttft_ms', False) / 1e3:.1f}",
        "TPOT of later turns, ms": lambda r: f"{middle(r, 'tpot_ms', False):.0f}",
        "prompt tokens from the cache": lambda r: (
            f"{r['cached_tokens'] / r['looked_up_tokens']:.0%}"
        ),
        "blocks at most": "peak_blocks",
        "preemptions": "preemptions",
    }
    return tables.table(result["runs"], columns)


def render(result: dict[str, Any]) -> str:
    """What was served, and :func:`runs`."""
    head = (
        f"{result['model']}, {result['conversations']} agents, {result['turns']} turns from"
        f" {result['start']} tokens, each adding {result['result']}, replies of {result['reply']},"
        f" a pool of {result['pool_tokens']} tokens (stock's); medians"
    )
    return f"{head}:\n\n{runs(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("replay", __doc__, "one agent, three short turns")
    harness.add_model(parser, "smollm2")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--start", type=int, default=2048, help="tokens of the first prompt")
    parser.add_argument("--result", type=int, default=768, help="tokens that a tool adds")
    parser.add_argument("--reply", type=int, default=64, help="tokens that are generated a turn")
    parser.add_argument("--rounds", type=int, default=1)
    add_options(parser, "half of all conversations")
    options = harness.parse(parser, arguments, QUICK)
    longest = options.start + (options.turns - 1) * options.result + options.reply
    options.context = -(-longest // harness.BLOCK_TOKENS) * harness.BLOCK_TOKENS
    options.pool_tokens = options.pool_tokens or max(1, options.agents // 2) * options.context
    chosen = arms.parse_arms(parser, options, baseline=True)
    body = {
        **{key: getattr(options, key) for key in ("model", "turns", "start", "result", "reply")},
        "conversations": options.agents, "pool_tokens": options.pool_tokens,
        "settings": {arm.name: arm.settings for arm in chosen}, "runs": [],
    }  # fmt: skip
    texts = corpus.documents(harness.tokenizer_of(options.model), options.agents, options.context)
    with Recorder(options.out, "replay", body) as record:
        for number, arm in in_turns(chosen, options.rounds):
            try:
                found = measure(arm, texts, options)
            except ServerError as error:
                sys.exit(f"benchmarks.replay: {error}")
            body["runs"].append({"arm": arm.name, "round": number, **found})
            record.save()
            harness.progress(f"{arm.name}: {found['seconds']:.1f} s")


if __name__ == "__main__":
    main()
