# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Renders each kind of result file as Markdown. What a file does not say stays blank."""

from __future__ import annotations

import statistics
import string
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Row = dict[str, Any]
    Columns = Mapping[str, str | Callable[[Any], object]]
    Renderer = Callable[[Any], str]


STEP = "{step_ms[median]:.1f} ({step_ms[p25]:.1f}-{step_ms[p75]:.1f})"


def table(rows: Iterable[Any], columns: Columns, *, aligned: bool = False) -> str:
    """Returns a Markdown table, or an aligned one for a terminal.

    Args:
        rows: Anything.
        columns: By header, the key of what to show of a row, a format for it, or what makes it of
            the row; blank if that is None or not there. Headers that repeat are kept apart by
            spaces at their end, which are not shown.
        aligned: Numbers to the right; ``-`` for what is not there.
    """
    cells = [[_cell(show, row) for show in columns.values()] for row in rows]
    if aligned:
        return _aligned([list(columns), *([text or "-" for text in line] for line in cells)])
    every = [
        [f" {text.strip()} ".replace("  ", " ") for text in line] for line in [columns, *cells]
    ]
    every.insert(1, ["---"] * len(columns))
    return "\n".join(f"|{'|'.join(line)}|" for line in every)


def _aligned(lines: list[list[str]]) -> str:
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(text[:1].isdigit() or text[0] in "-+" for text in each[1:]) for each in columns]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


class _Fields(string.Formatter):
    """Formats whose fields are a row's keys, one inside the other: ``{step_ms[median]:.1f}``."""

    def get_field(self, name: str, args: Any, row: Any) -> tuple[Any, str]:
        first, *further = name.replace("]", "").split("[")
        value = row[first]
        for key in further:
            value = value[int(key) if isinstance(value, list) else key]
        return value, first


def _cell(show: str | Callable[[Any], object], row: Any) -> str:
    try:
        if callable(show):
            value = show(row)
        else:
            value = _Fields().vformat(show, (), row) if "{" in show else row.get(show)
    except (KeyError, TypeError):  # not measured, or measured as nothing
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def number(
    digits: int, *keys: str | int, unit: str = "", scale: float = 1.0
) -> Callable[[Row], str]:
    """Shows a number with so many digits, found under keys one inside the other."""
    return lambda row: f"{reduce(getitem, keys, row) * scale:.{digits}f}{unit}"


def mib(*keys: str, digits: int = 2, unit: str = "") -> Callable[[Row], str]:
    """Shows bytes as MiB."""
    return number(digits, *keys, unit=unit, scale=2**-20)


def _named(rows: dict[str, Row]) -> list[Row]:
    return [{"arm": name, **row} for name, row in rows.items()]


def speed(result: Row) -> str:
    """Decode and prefill times."""
    parts = []
    for cell in result["cells"]:
        what, others = cell["cell"], cell.get("cores_used_by_others") or {}
        kind = ", one shared document" if what["shared"] else ", different documents"
        bound = f"bound {cell['bound']:.2f}x" if cell["bound"] else "no bound yet"
        used = f"{others['median']:.2f} cores, at most {others['max']:.2f}" if others else "?"
        parts.append(
            f"**{what['model']}, {what['context']} tokens, batch {what['batch']}"
            f"{kind if what['batch'] > 1 else ''}**: {bound} (other processes used {used})"
        )
        columns = {
            "arm": "arm",
            "decode step, ms (quartiles)": STEP,
            "at 128 tokens": "{step_ms_at_128_tokens[median]:.1f}",
            "tokens/s": "{decode_tokens_per_second:.1f}",
            "speed-up (by round)": (
                "{speedup:.2f}x ({speedup_by_round[min]:.2f}-{speedup_by_round[max]:.2f})"
            ),
            "of the bound": "{share_of_bound:.0%}",
            "prefill, s": "{prefill_seconds[median]:.2f}",
            "overhead": "{prefill_overhead_percent:+.1f} %",
        }
        if any("second_token_seconds" in row for row in cell["arms"].values()):  # newer files
            columns |= {
                "to the second token, s": "{second_token_seconds[median]:.2f}",
                "overhead ": "{second_token_overhead_percent:+.1f} %",
            }
        parts.append(table(_named(cell["arms"]), columns))
    return "\n\n".join(parts)


def prompts(result: Row) -> str:
    """Whole prompts."""
    parts = []
    for cell in result["cells"]:
        others = cell.get("cores_used_by_others") or {}
        used = f"{others['median']:.2f} cores" if others else "?"
        parts.append(f"**{cell['context']} tokens** (other processes used {used})")
        columns = {
            "arm": "arm",
            "s": "{seconds[median]:.1f}",
            "CPU s": "{cpu[median]:.1f}",
            "speed-up": "{speedup_seconds:.2f}x",
            "in CPU s": "{speedup_cpu:.2f}x",
            "bound": "{bound:.2f}x",
            "attention, s": "{attention[median]:.1f}",
            "selection, s": "{choose_blocks[median]:.2f}",
            "pairs computed": "{share_of_pairs:.0%}",
            "blocks needed by a chunk": "{needed_share_of_blocks:.0%}",
        }
        parts.append(table(_named(cell["arms"]), columns))
    return "\n\n".join(parts)


def accuracy(result: Row) -> str:
    """Needles, conversations and prose."""
    rows = _named(result["arms"])

    def every(task: str) -> list[str]:
        return list(dict.fromkeys(key for row in rows for key in row.get(task, {})))

    columns: dict[str, Any] = {"arm": "arm"}
    for task in ("single", "multikey"):
        for context in every(task):
            cell = f"{task}[{context}]"
            title = f"{task} {int(context) // 1024}K"
            columns[title] = f"{{{cell}[correct]}}/{{{cell}[questions]}}"
    for mode in every("two-turn"):
        cell = f"two-turn[{mode}]"
        columns[f"2nd turn, {mode}"] = f"{{{cell}[second_turn]}}/{{{cell}[conversations]}}"
    if any("prose" in row for row in rows):
        columns["prose KL"] = "{prose[kl]:.3f}"
        columns["top-1"] = "{prose[top1_agreement]:.3f}"
    if any("kl_by_quarter" in row.get("prose", {}) for row in rows):
        columns["KL by quarter"] = lambda row: " / ".join(
            f"{part:.3f}" for part in row["prose"]["kl_by_quarter"]
        )
    return f"**{result['model']}**, seed {result['seed']}\n\n{table(rows, columns)}"


def generations(result: Row) -> str:
    """Steps and memory of long generations, where the tokens so far have doubled."""
    parts = [f"**{result['model']}**"]
    for name, cell in result["cells"].items():
        curves = {
            arm: {point["generated"]: point for point in row["curve"]}
            for arm, row in cell["arms"].items()
        }
        points = sorted(next(iter(curves.values())))
        shown = [at for n, at in enumerate(points, 1) if n & (n - 1) == 0 or at == points[-1]]
        columns: dict[str, Any] = {"generated": "generated"}
        for arm in curves:
            columns[f"{arm}, ms (CPU)"] = f"{{{arm}[step_ms]:.2f}} ({{{arm}[cpu_ms]:.2f}})"
            columns[f"{arm}, MiB"] = mib(arm, "device_bytes", digits=1)
        rows = [{"generated": at, **{arm: curves[arm].get(at) for arm in curves}} for at in shown]
        others = cell["cores_used_by_others"]
        used = f"{statistics.median(others):.2f} cores" if others else "?"
        parts += [f"{name} tokens (other processes used {used})", table(rows, columns)]
    return "\n\n".join(parts)


def capacity(result: Row) -> str:
    """How many requests a pool holds."""
    columns = {
        "arm": "arm", "most running at once": "peak_running", "mean": "{mean_running:.1f}",
        "preemptions": "{preemptions:.0f}",
        "blocks per decoding request": "{blocks_per_decoding_request:.1f}",
        "peak pool usage": "{peak_usage_percent:.0f} %", "seconds in all": "{seconds:.0f}",
        "vLLM's maximum concurrency": "{log[maximum_concurrency]:.2f}x",
    }  # fmt: skip
    return (
        f"**{result['model']}**: {_requests(result)}, pool of {result['pool_blocks']} blocks of "
        f"{result['block_tokens']} tokens\n\n{table(_named(result['arms']), columns)}"
    )


def _requests(result: Row) -> str:
    return (
        f"{result['requests']} requests of {result['prompt_tokens']} + "
        f"{result['generated_tokens']} tokens"
    )


def kernels(result: Row) -> str:
    """Times of kernels on a CPU."""
    body = result["result"]
    columns: dict[str, Any] = {
        "variant": "arm",
        "us a layer": "{us:.0f}",
        "10th percentile": "{us_p10:.0f}",
    }
    if any("least_bytes" in row for row in body["variants"].values()):
        columns["bytes at least, MB"] = number(2, "least_bytes", scale=1e-6)
    if "over_floor" in body:
        read = f"{body['bytes_read'] / 1e6:.2f} MB at {body['sequential_read_gb_per_s']:.1f} GB/s"
        floor = f"floor {body['floor_us']:.0f} us a layer ({read}): "
        if body["over_floor"] >= 1:
            floor += f"fused is {body['over_floor']:.1f}x the floor"
        else:  # nobody reads faster than memory is
            floor = f"no floor: {read} were measured, which the kernel itself beats"
    else:
        floor = "no floor yet"
    return (
        f"{result['threads']} threads, {body['kept_tokens']} kept tokens a request, top_k "
        f"{body['top_k']}, top_r {body['top_r']}; {floor}\n\n"
        + table(_named(body["variants"]), columns)
    )


def blocks(result: Row) -> str:
    """How much attention each selector finds, on average and by layer."""
    parts = [
        f"**{result['model']}**, blocks of {result['block_tokens']} tokens, "
        f"{result['init_blocks']} first and {result['local_blocks']} + 1 last ones forced"
    ]
    for cell in result["cells"]:
        selectors = cell["selectors"]
        tops = list(next(iter(selectors.values())))
        columns = {"selector": "arm"}
        layers: dict[str, Any] = {"layer": "layer", "forced blocks": "{forced:.2f}"}
        for what, key in (("mass beyond the forced blocks", "captured"), ("misses", "miss_rate")):
            columns |= {f"{what}, top {n}": f"{{{n}[{key}]:.2f}}" for n in tops}
        top = tops[len(tops) // 2]
        rows = [{"layer": at, "forced": x} for at, x in enumerate(cell["forced_share_by_layer"])]
        for prefix, key in (("", "captured_by_layer"), ("misses of ", "miss_rate_by_layer")):
            for name, found in selectors.items():
                layers[prefix + name] = f"{{{prefix + name}:.2f}}"
                for row, share in zip(rows, found[top][key], strict=True):
                    row[prefix + name] = share
        parts += [
            f"{cell['task']}, {cell['context']} tokens, {cell['steps']} steps; the forced blocks "
            f"hold {cell['forced_share']:.2f} of all mass",
            table(_named(selectors), columns),
            f"By layer, top {top}:",
            table(rows, layers),
        ]
    return "\n\n".join(parts)


def memory(result: Row) -> str:
    """Device memory per request."""
    rows = [
        {**arm, "cell": f"{cell['model']}, {cell['tokens']}"}
        for cell in result["cells"]
        for arm in _named(cell["arms"])
    ]
    parts = ("kv_cache", "frames", "compressed_keys", "staging", "page_table")
    columns = {
        "model, tokens": "cell",
        "arm": "arm",
        **{part.replace("kv_", "KV ").replace("_", " "): mib("parts", part) for part in parts},
        "device, MiB a request": mib("device_bytes"),
        "less than dense": "{times_less_than_dense:.2f}x",
        "host, MiB": lambda row: mib("host_bytes")(row) if row["host_bytes"] else None,
    }
    return f"{result['requests']} request(s) decoding\n\n{table(rows, columns)}"


def overlap(result: Row) -> str:
    """Waiting times at forced miss rates."""
    order = list(result["settings"])
    rows = sorted(result["rows"], key=lambda row: (row["rate"], order.index(row["arm"])))
    columns = {
        "misses forced (and counted)": "{rate:.0%} ({miss_share_of_free_picks:.1%})",
        "arm": "arm", "step, ms (quartiles)": STEP,
        "exposed wait, ms a step": "{exposed_wait_ms_per_step:.2f}", "late": "{late_share:.0%}",
        "hits a step": "{hits_per_step:.1f}", "misses a step": "{misses_per_step:.1f}",
        "MB a step": number(3, "bytes_per_step", scale=1e-6),
    }  # fmt: skip
    return (
        f"**{result['model']}**, {result['context']} tokens, batch {result['batch']}, "
        f"{result['top_k']} blocks, copy engine at {result['link_gb_per_s'] or 0:.3f} GB/s; bytes "
        f"moved equal misses x {result['shape'].get('piece_bytes')} bytes in every turn\n\n"
        + table(rows, columns)
    )


def serve(result: Row) -> str:
    """Requests whose KV exceeds the device."""
    columns = {
        "arm": "arm", "finished": "finished", "lost": "lost", "of full length": "complete",
        "preemptions": "{preemptions:.0f}", "most running at once": "peak_running",
        "KV over slab": "{kv_over_slab:.2f}x", "slab, MiB": mib("pools", "slab"),
        "seconds in all": "{seconds:.0f}",
        "tokens as stock's": (
            "{tokens_before_difference[median]:.0f} "
            "({tokens_before_difference[min]:.0f}-{tokens_before_difference[max]:.0f})"
        ),
    }  # fmt: skip
    rows = table(_named(result["arms"]), columns)
    return f"**{result['model']}**: {_requests(result)} at once\n\n{rows}"


def training(result: Row | list[Row]) -> str:
    """Memory and speed of Forecast training; older files are lists of points."""
    columns = {
        "tokens": "tokens", "queries at once": "chunk",
        "MiB beyond the model": "peak_beyond_start_mib", "tokens/s": "{tokens_per_s:.1f}",
        "loss": "{loss:.6f}", "left out, needs GiB": "{left_out_gib:.0f}",
    }  # fmt: skip
    return table(result["cells"], columns)


def recall(result: Row) -> str:
    """How well a Forecast finds blocks."""
    columns = {
        "selector": "arm",
        "recall of the exact best blocks": "{recall:.3f}",
        "attention mass beyond the forced blocks": "{mass:.3f}",
    }
    return "\n\n".join(
        f"**{result['model']}**, {result['forecast'] or 'no Forecast'}, {result['documents']} "
        f"documents of {cell['context']} tokens, {result['geometry']['top_k']} blocks\n\n"
        + table(_named(cell["mean"]), columns)
        for cell in result["cells"]
    )


def stages(result: Row) -> str:
    """What the GPU programs write."""
    rows = [{"arm": name, **stage} for name, stage in result["stages"].items()]
    columns = {
        "stage": "arm", "result": "status", "seconds": "{seconds:.0f}",
        "measurements": lambda row: len(row["rows"]), "reason": "reason",
    }  # fmt: skip
    verdicts = {"target": "what", "found": "{found:.3f}", "reached": "reached"}
    targets = result.get("targets")
    parts = [table(rows, columns), table(targets, verdicts) if targets else ""]
    return "\n\n".join(filter(None, parts))


def faults(result: Row) -> str:
    """What a soak or generated requests met."""
    found = result.get("faults", [])
    said = f"{len(found)} faults, first: {found[0]}" if found else "no fault"
    rows = [{"what": what, "n": n} for what, n in result.get("counts", {}).items()]
    head = f"**{result['backend']}**, {result['minutes']:g} minutes, seed {result['seed']}: {said}"
    return f"{head}\n\n{table(rows, {'what': 'what', 'number': '{n:,}'})}"


RENDERERS: dict[str, Renderer] = {
    "kernels": kernels, "speed": speed, "prompts": prompts, "accuracy": accuracy,
    "capacity": capacity, "generations": generations, "blocks": blocks, "memory": memory,
    "overlap": overlap, "serve": serve, "train-memory": training, "recall": recall,
    **dict.fromkeys(("soak", "fuzz"), faults),
    **dict.fromkeys(("gpu-first", "gpu-check", "gpu-bench", "gpu-tune"), stages),
}  # fmt: skip
