# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What happened since the last line of the log, in one line for an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.metrics.definitions import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Values = Mapping[tuple[str, str], float]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def line(backend: str, before: Values, after: Values) -> str | None:
    """Describe what was counted between two readings.

    Args:
        backend: Name of the backend.
        before: By name and reason, see :func:`vllm_sparse.metrics.published.read`.
        after: The later reading.

    Returns:
        The line; ``None`` if no counter has moved.
    """
    grown = {
        key: value - before.get(key, 0.0)
        for key, value in after.items()
        if not METRICS[key[0]].gauge and value > before.get(key, 0.0)
    }
    if not grown:
        return None

    def of(name: str) -> float:
        return grown.get((name, ""), 0.0)

    parts = [_requests(of("requests"), grown)]
    if of("decode_rows"):
        parts.append(_reads(of))
    if freed := of("blocks_evicted"):
        now = after.get(("blocks_saved", ""), 0.0)
        parts.append(f"KV blocks freed: {freed:.0f} (running requests save {now:.0f})")
    if asked := of("frame_hits") + of("frame_misses"):
        parts.append(_fetches(of, asked))
    if streamed := of("streamed_bytes"):
        parts.append(f"streamed for prompts: {_size(streamed)}")
    if waited := of("exposed_wait_seconds"):
        parts.append(f"layers waited {1000 * waited:.1f} ms for copies")
    return f"{backend}: {', '.join(parts)}"


def _requests(sparse: float, grown: Values) -> str:
    """Requests whose prompt has ended: their number by how they are served."""
    reasons = {reason: n for (name, reason), n in grown.items() if name == "dense_fallbacks"}
    why = ", ".join(f"{reason}: {n:.0f}" for reason, n in sorted(reasons.items()))
    return f"Sparse: {sparse:.0f} reqs, Dense: {sum(reasons.values()):.0f} reqs" + (
        f" ({why})" if why else ""
    )


def _reads(of: Callable[[str], float]) -> str:
    unit = "blocks" if of("visible_blocks") else "tokens"
    visible = of(f"visible_{unit}")
    share = 100 * of(f"selected_{unit}") / visible if visible else 100.0
    return f"decode read {share:.1f}% of the context's {unit}"


def _fetches(of: Callable[[str], float], asked: float) -> str:
    missed, ahead = of("frame_misses"), of("prefetch_issued")
    text = f"fetched: {100 * missed / asked:.1f}% of the blocks read"
    if missed:
        text += f", {_size(of('host_to_device_bytes'))}, {100 * ahead / missed:.1f}% a layer ahead"
    if ahead:
        text += f", {100 * of('prefetch_late') / ahead:.1f}% of these late"
    return text


def _size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit + 1 < len(_UNITS):
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {_UNITS[unit]}"
