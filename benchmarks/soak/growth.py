# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether a server that has been used for long holds more than one that has been used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.soak.watch import Held

# Of a process: allocators keep what they have fragmented, and oneDNN a primitive for each shape.
MOST_BYTES = 256 << 20
_FEW_TENSORS = 16  # of the last step


def of_processes(early: Mapping[str, Held], late: Mapping[str, Held]) -> list[str]:
    """Returns what grew, in words.

    Args:
        early: By what each process does, once every thread was needed and every buffer made.
        late: In the end.
    """
    faults = []
    for role, then in late.items():
        first = early[role]
        if then.threads > first.threads:
            faults.append(f"{role}: {first.threads} threads became {then.threads}")
        if then.files > first.files:
            faults.append(f"{role}: {first.files} open files became {then.files}")
        if then.rss_bytes > first.rss_bytes + MOST_BYTES:
            faults.append(f"{role}: {first.rss_bytes} bytes became {then.rss_bytes}")
    return faults


def of_worker(early: Mapping[str, Any], late: Mapping[str, Any]) -> list[str]:
    """Returns what grew, or is not as it was.

    Args:
        early: What :meth:`.probe.Probe.soak_look` saw.
        late: In the end.
    """
    faults = [
        f"the worker's {key} grew from {early[key]} to {late[key]}"
        for key in ("tensors", "tensor_bytes")
        if late[key] > 1.05 * early[key] + _FEW_TENSORS
    ]
    return faults + [
        f"the worker's {key} were {early.get(key)}, are {late.get(key)}"
        for key in ("host_bytes", "threads")
        if late.get(key) != early.get(key)
    ]
