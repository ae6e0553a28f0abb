# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Renders the result files as Markdown.

``python -m benchmarks.report [FILES...]`` prints every result in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import harness


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(result: dict) -> str:
    """Renders decode and prefill times."""
    parts = []
    for cell in result["cells"]:
        what = cell["cell"]
        kind = "one shared document" if what["shared"] else "different documents"
        rows = []
        for name, row in cell["arms"].items():
            step, short = row["step_ms"], row["step_ms_at_128_tokens"]
            rounds, prefill = row["speedup_by_round"], row["prefill_seconds"]
            rows.append(
                [
                    name,
                    _spread(step, 1),
                    f"{short['median']:.1f}",
                    f"{row['decode_tokens_per_second']:.1f}",
                    f"{row['speedup']:.2f}x ({rounds['min']:.2f}-{rounds['max']:.2f})",
                    f"{row['share_of_bound']:.0%}",
                    f"{prefill['median']:.2f}",
                    f"{row['prefill_overhead_percent']:+.1f} %",
                ]
            )
        others = cell["cores_used_by_others"]
        parts += [
            f"**{what['model']}, {what['context']} tokens, batch {what['batch']}"
            + (f", {kind}" if what["batch"] > 1 else "")
            + f"**: bound {cell['bound']:.2f}x "
            f"(other processes used {others['median']:.2f} cores, at most {others['max']:.2f})",
            table(
                [
                    "arm",
                    "decode step, ms (quartiles)",
                    "at 128 tokens",
                    "tokens/s",
                    "speed-up (by round)",
                    "of the bound",
                    "prefill, s",
                    "overhead",
                ],
                rows,
            ),
        ]
    return "\n\n".join(parts)


def accuracy(result: dict) -> str:
    """Renders needles, conversations and prose."""
    arms = result["arms"]
    tasks = [
        (task, context)
        for task in ("single", "multikey")
        for context in next(iter(arms.values())).get(task, {})
    ]
    header = ["arm", *(f"{task} {int(context) // 1024}K" for task, context in tasks)]
    modes = list(next(iter(arms.values())).get("two-turn", {}))
    header += [f"2nd turn, {mode}" for mode in modes]
    prose = any("prose" in arm for arm in arms.values())
    header += ["prose KL", "top-1"] if prose else []
    rows = []
    for name, arm in arms.items():
        row = [name]
        for task, context in tasks:
            cell = arm.get(task, {}).get(context)
            row.append(f"{cell['correct']}/{cell['questions']}" if cell else "")
        for mode in modes:
            cell = arm.get("two-turn", {}).get(mode)
            row.append(f"{cell['second_turn']}/{cell['conversations']}" if cell else "")
        if prose:
            cell = arm.get("prose")
            row += [f"{cell['kl']:.3f}", f"{cell['top1_agreement']:.3f}"] if cell else ["", ""]
        rows.append(row)
    return f"**{result['model']}**, seed {result['seed']}\n\n{table(header, rows)}"


def capacity(result: dict) -> str:
    """Renders how many requests a pool holds."""
    rows = []
    for name, arm in result["arms"].items():
        blocks = arm["blocks_per_decoding_request"]
        rows.append(
            [
                name,
                str(arm["peak_running"]),
                f"{arm['mean_running']:.1f}",
                str(int(arm["preemptions"])),
                f"{blocks:.1f}" if blocks is not None else "",
                f"{arm['peak_usage_percent']:.0f} %",
                f"{arm['seconds']:.0f}",
                f"{arm['log']['maximum_concurrency']}x",
            ]
        )
    header = [
        "arm",
        "most running at once",
        "mean",
        "preemptions",
        "blocks per decoding request",
        "peak pool usage",
        "seconds in all",
        "vLLM's maximum concurrency",
    ]
    return (
        f"**{result['model']}**: {result['requests']} requests of {result['prompt_tokens']} + "
        f"{result['generated_tokens']} tokens, pool of {result['pool_blocks']} blocks of "
        f"{result['block_tokens']} tokens\n\n{table(header, rows)}"
    )


def kernels(result: dict) -> str:
    """Renders the decode kernel's times."""
    body = result["result"]
    rows = [
        [name, f"{row['us']:.0f}", f"{row['us_p10']:.0f}"] for name, row in body["variants"].items()
    ]
    return (
        f"{result['threads']} threads, {body['kept_tokens']} kept tokens a request, top_k "
        f"{body['top_k']}, top_r {body['top_r']}; floor {body['floor_us']:.0f} us a layer "
        f"({body['bytes_read'] / 1e6:.2f} MB at {body['sequential_read_gb_per_s']:.1f} GB/s): "
        f"fused is {body['over_floor']:.1f}x the floor\n\n"
        + table(["variant", "us a layer", "10th percentile"], rows)
    )


def blocks(result: dict) -> str:
    """Renders how much attention each selector finds, on average and by layer."""
    parts = [
        f"**{result['model']}**, blocks of {result['block_tokens']} tokens, "
        f"{result['init_blocks']} first and {result['local_blocks']} + 1 last ones forced"
    ]
    for cell in result["cells"]:
        selectors = cell["selectors"]
        tops = list(next(iter(selectors.values())))
        header = ["selector"]
        for what in ("mass beyond the forced blocks", "misses"):
            header += [f"{what}, top {top}" for top in tops]
        rows = []
        for name, found in selectors.items():
            shares = [found[top][key] for key in ("captured", "miss_rate") for top in tops]
            rows.append([name, *(f"{share:.2f}" for share in shares)])
        top = tops[len(tops) // 2]
        by_layer = [
            [
                str(layer),
                f"{share:.2f}",
                *(f"{found[top]['captured_by_layer'][layer]:.2f}" for found in selectors.values()),
                *(f"{found[top]['miss_rate_by_layer'][layer]:.2f}" for found in selectors.values()),
            ]
            for layer, share in enumerate(cell["forced_share_by_layer"])
        ]
        columns = [*selectors, *(f"misses of {name}" for name in selectors)]
        parts += [
            f"{cell['task']}, {cell['context']} tokens, {cell['steps']} steps; the forced blocks "
            f"hold {cell['forced_share']:.2f} of all mass",
            table(header, rows),
            f"By layer, top {top}:",
            table(["layer", "forced blocks", *columns], by_layer),
        ]
    return "\n\n".join(parts)


def memory(result: dict) -> str:
    """Renders device memory per request."""
    keys = ("kv_cache", "frames", "compressed_keys", "staging", "page_table")
    rows = []
    for cell in result["cells"]:
        for name, arm in cell["arms"].items():
            parts = arm["parts"]
            rows.append(
                [
                    f"{cell['model']}, {cell['tokens']}",
                    name,
                    *(_mib(parts[key]) if key in parts else "" for key in keys),
                    _mib(arm["device_bytes"]),
                    f"{arm['times_less_than_dense']:.2f}x",
                    _mib(arm["host_bytes"]) if arm["host_bytes"] else "",
                ]
            )
    header = [
        "model, tokens",
        "arm",
        "KV cache",
        "frames",
        "compressed keys",
        "staging",
        "page table",
        "device, MiB a request",
        "less than dense",
        "host, MiB",
    ]
    return f"{result['requests']} request(s) decoding\n\n{table(header, rows)}"


def overlap(result: dict) -> str:
    """Renders waiting times at forced miss rates."""
    rows, arms = [], list(result["settings"])
    for row in sorted(result["rows"], key=lambda row: (row["rate"], arms.index(row["arm"]))):
        late = row["late_share"]
        rows.append(
            [
                f"{row['rate']:.0%} ({row['miss_share_of_free_picks']:.1%})",
                row["arm"],
                _spread(row["step_ms"], 1),
                f"{row['exposed_wait_ms_per_step']:.2f}",
                f"{late:.0%}" if late is not None else "",
                f"{row['hits_per_step']:.1f}",
                f"{row['misses_per_step']:.1f}",
                f"{row['bytes_per_step'] / 1e6:.3f}",
            ]
        )
    header = [
        "misses forced (and counted)",
        "arm",
        "step, ms (quartiles)",
        "exposed wait, ms a step",
        "late",
        "hits a step",
        "misses a step",
        "MB a step",
    ]
    return (
        f"**{result['model']}**, {result['context']} tokens, batch {result['batch']}, "
        f"{result['top_k']} blocks, copy engine at {result['link_gb_per_s']:.3f} GB/s; bytes moved "
        f"equal misses x {result['shape']['piece_bytes']} bytes in every turn\n\n"
        + table(header, rows)
    )


def serve(result: dict) -> str:
    """Renders requests whose KV exceeds the device."""
    rows = []
    for name, arm in result["arms"].items():
        over, same = arm["kv_over_slab"], arm["tokens_before_difference"]
        rows.append(
            [
                name,
                f"{arm['finished']}",
                f"{arm['lost']}",
                f"{arm['complete']}",
                f"{arm['preemptions']:.0f}",
                f"{arm['peak_running']}",
                f"{over:.2f}x" if over is not None else "",
                _mib(arm["pools"]["slab"]) if arm["pools"] else "",
                f"{arm['seconds']:.0f}",
                f"{same['median']:.0f} ({same['min']:.0f}-{same['max']:.0f})",
            ]
        )
    header = [
        "arm",
        "finished",
        "lost",
        "of full length",
        "preemptions",
        "most running at once",
        "KV over slab",
        "slab, MiB",
        "seconds in all",
        "tokens as stock's",
    ]
    return (
        f"**{result['model']}**: {result['requests']} requests of {result['prompt_tokens']} + "
        f"{result['generated_tokens']} tokens at once\n\n{table(header, rows)}"
    )


RENDERERS = {
    "kernels": kernels,
    "speed": speed,
    "accuracy": accuracy,
    "capacity": capacity,
    "oracle": accuracy,
    "blocks": blocks,
    "memory": memory,
    "overlap": overlap,
    "serve": serve,
}


def render(path: Path) -> str:
    """Returns one result file as a Markdown section."""
    result = json.loads(path.read_text())
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return "\n\n".join(
        [
            f"### {path.stem}",
            f"`{env['command']}`",
            RENDERERS[result["benchmark"]](result),
            f"{env['cpu']}, {env['cores']} cores, {env['memory_gib']} GiB; {versions}; "
            f"{env['date']}",
        ]
    )


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2f}"


def _spread(values: dict, digits: int) -> str:
    median, lower, upper = (f"{values[key]:.{digits}f}" for key in ("median", "p25", "p75"))
    return f"{median} ({lower}-{upper})"


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    files = options.files or sorted(harness.RESULTS_DIR.glob("*.json"))
    print("\n\n".join(render(path) for path in files))


if __name__ == "__main__":
    main()
