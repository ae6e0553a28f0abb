# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tile sizes, warps and grid sizes.

Nothing is tuned at start-up or mid-request. A table for the architecture is shipped; `make
gpu-tune` finds a better one for one kind of GPU, and leaves it in a file that is read from then on.
"""

from __future__ import annotations

import json
import logging
import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from vllm_sparse.errors import ConfigError
from vllm_sparse.paths import atomic_path, cache_dir

# A child of vLLM's logger: others have no handler in its processes.
logger = logging.getLogger("vllm.sparse")

# Entries that are worth a program where rows alone fill the GPU: it starts with a chain of loads,
# for which fewer do not pay.
_WORTH = 512

# A file with launches of one kind of GPU, or nothing to read none.
LAUNCHES_ENV = "VLLM_SPARSE_LAUNCHES"


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: Elements of the tiled axis (tokens, pages or candidates) per iteration.
        num_warps: Warps per program.
        num_stages: Software pipeline depth.
    """

    block: int
    num_warps: int
    num_stages: int


# By kernel: heads of up to 256 bytes (128 channels of bfloat16), and larger ones. Bounded by
# registers and by shared memory: 163 KiB on sm_80, 227 KiB on sm_90; ROCKETKV's decode kernels and
# the attention over frames stay within the 99 KiB of sm_86. A loop whose loads need an address
# that is itself loaded has half as many buffers as stages, so that 4 would be one and 5 are two.
# Not measured on hardware yet, see docs/kernels.md.
_SM80 = {
    "prompt": (Launch(64, 8, 2), Launch(32, 8, 2)),
    "pool": (Launch(512, 4, 1), Launch(512, 4, 1)),
    "top_indices": (Launch(2048, 8, 1), Launch(2048, 8, 1)),
    "compact": (Launch(16, 4, 1), Launch(16, 8, 1)),
    "select_slots": (Launch(128, 8, 5), Launch(64, 8, 5)),
    "attend": (Launch(32, 4, 5), Launch(32, 4, 5)),
    "score_blocks": (Launch(64, 4, 5), Launch(32, 4, 5)),
    "choose_blocks": (Launch(4096, 8, 1), Launch(4096, 8, 1)),
    "wanted": (Launch(256, 4, 1), Launch(256, 4, 1)),
    "replace": (Launch(2048, 8, 1), Launch(2048, 8, 1)),
    "copy_pieces": (Launch(4096, 8, 1), Launch(4096, 8, 1)),
    "attend_part": (Launch(64, 8, 2), Launch(32, 8, 2)),
    "list_blocks": (Launch(64, 4, 1), Launch(64, 4, 1)),
}
_SM90 = {
    **_SM80,
    "prompt": (Launch(128, 8, 2), Launch(64, 8, 2)),
}

# Launched alike everywhere, and not tuned: what they take is the launch and a few loads, not tiles.
# A block is what their programs have of entries; three stages are Triton's default, for no loop.
FIXED = {
    "append": Launch(1, 1, 1),
    "append_and_probe": Launch(1, 4, 1),
    "append_and_probe_large": Launch(1, 8, 1),  # heads of more than 128 channels
    "plan_rows": Launch(1024, 4, 1),  # entries of the block table
    "merge_normalisers": Launch(32, 4, 3),  # queries: 16 of the shares' numbers a thread
    "write_tokens": Launch(1, 1, 3),
    "write_tokens_and_windows": Launch(1, 4, 3),
    "record_queries": Launch(8, 4, 3),  # heads
    "recall_queries": Launch(1024, 4, 3),  # numbers of queries
}


# Up to so many bytes the first launch of a pair is meant.
SMALL_HEAD = 256


class Table(NamedTuple):
    """Launches for a device.

    Attributes:
        launches: By kernel: heads of up to 256 bytes, and larger ones.
        origin: Where they are from, in words.
    """

    launches: dict[str, tuple[Launch, Launch]]
    origin: str


def launch(
    kernel: str, device: torch.device, head_dim: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Launch:
    """The launch of a kernel on a device.

    Args:
        kernel: A key of the table above.
        device: CPUs (Triton's interpreter) use the sm_80 entry, unless a file is given.
        head_dim: D.
        dtype: Of what is loaded.

    Raises:
        ConfigError: See :func:`launches`.
    """
    size = head_dim * dtype.itemsize
    found = launches(device).launches[kernel][size > SMALL_HEAD]
    # The table is for 16-bit numbers, whose heads have at most 512 bytes.
    return found._replace(block=max(16, found.block // 2)) if size > 512 else found


@cache
def launches(device: torch.device) -> Table:
    """All launches for a device; unknown GPUs use those of the nearest older architecture.

    Raises:
        ConfigError: A tuned table is asked for or there, but is not one.
    """
    if device.type != "cuda":
        shipped = Table(_SM80, "not tuned")
    elif capability(device) >= (9, 0):
        shipped = Table(_SM90, "shipped for sm_90")
    else:
        shipped = Table(_SM80, "shipped for sm_80")
    path = tuned_path(gpu_name(device))
    if path is None or not (path.is_file() or os.environ.get(LAUNCHES_ENV)):
        return shipped
    return Table({**shipped.launches, **read_launches(path)}, f"tuned, {path}")


def gpu_name(device: torch.device) -> str:
    """Name of a GPU, empty for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def tuned_path(gpu: str) -> Path | None:
    """Where the tuned table of a kind of GPU is; ``None`` if none is wanted.

    ``$VLLM_SPARSE_LAUNCHES``, or a file of the cache folder named after GPU and Triton.

    Args:
        gpu: See :func:`gpu_name`. The interpreter has no file in the cache folder.
    """
    configured = os.environ.get(LAUNCHES_ENV, None if gpu else "")
    if configured is not None:
        return Path(configured) if configured else None
    name = f"{gpu.replace(' ', '-')}-triton-{triton.__version__}.json"
    return cache_dir() / "launches" / name


def read_launches(path: Path) -> dict[str, tuple[Launch, Launch]]:
    """Reads a tuned table: by kernel ``[block, num_warps, num_stages]`` of small and large heads.

    Raises:
        ConfigError: It cannot be read, or a kernel cannot be launched so. Unknown kernels, as of
            another version, are left out with a warning.
    """
    try:
        listed = json.loads(path.read_text())["launches"]
        unknown = sorted(listed.keys() - _SM80.keys())
        found = {
            kernel: tuple(Launch(*map(int, launch)) for launch in pair)
            for kernel, pair in listed.items()
            if kernel in _SM80
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a table of kernel launches ({error}). {_REMEDY}") from error
    if unknown:
        logger.warning(
            "%s: launches of kernels that this version of vllm-sparse does not have, which are "
            "ignored: %s",
            path,
            ", ".join(unknown),
        )
    wrong = sorted(
        kernel
        for kernel, pair in found.items()
        if len(pair) != 2 or not all(valid(kernel, launch) for launch in pair)
    )
    if wrong:
        raise ConfigError(f"{path}: no valid launches of kernels: {', '.join(wrong)}. {_REMEDY}")
    return found  # type: ignore[return-value]


def write_launches(
    path: Path, table: dict[str, tuple[Launch, Launch]], facts: dict[str, Any]
) -> None:
    """Writes what :func:`read_launches` reads.

    Args:
        path: Its folder is made if there is none.
        table: Of any kernels; the others keep what is shipped.
        facts: How they were found, as JSON, for whoever opens the file.
    """
    with atomic_path(path) as scratch:  # who starts meanwhile reads the old table or the new one
        scratch.write_text(json.dumps({"launches": table, "facts": facts}))


_REMEDY = "Remove it, or make it again with `make gpu-tune` of vllm-sparse"


# Kernels that count digits, and what part of their block the smallest tile has.
_COUNTING = {"top_indices": 1, "choose_blocks": 4}


def valid(kernel: str, launch: Launch) -> bool:
    """Whether a kernel can be launched so, as far as one can tell without trying."""
    powers = all(
        number > 0 and number & (number - 1) == 0 for number in (launch.block, launch.num_warps)
    )
    # Threads without an entry of their own would count another's again.
    counts = launch.block // _COUNTING.get(kernel, 1) >= 32 * launch.num_warps
    return (
        kernel in _SM80 and powers and launch.num_stages > 0 and (counts or kernel not in _COUNTING)
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that it splits work as well."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends (programmatic dependent launch)."""
    return capability(device) >= (9, 0)


# Kernels take powers of two, which GPUs compute faster.
LOG2_E = math.log2(math.e)

# Shares of a row at most: what kernels that merge them have room for.
MOST_SHARES = 64


def splits(programs: int, tiles: int, device: torch.device, most: int = MOST_SHARES) -> int:
    """Into how many programs to split each row's work so that the GPU is full.

    Args:
        programs: Programs without splitting.
        tiles: Tiles that the longest row may have.
        device: Where the kernel runs.
        most: Upper limit.

    Returns:
        A power of two; it depends on shapes only, as a captured graph needs.
    """
    wanted = -(-2 * multiprocessors(device) // max(programs, 1))
    return triton.next_power_of_2(max(1, min(wanted, tiles, most)))


class Split(NamedTuple):
    """How rows are split over programs, see :func:`.ops.share_of`.

    Attributes:
        shares: Programs of a row.
        least: Tiles that a program has at least, if there are so many.
    """

    shares: int
    least: int


def split_rows(programs: int, entries: int, block: int, device: torch.device) -> Split:
    """How to split rows of unlike lengths.

    Programs fill the GPU even if all rows are short. Where there are enough rows for that, they
    are split only into shares that are worth a program, yet so far that a row which is much
    longer than the others does not end long after them.

    Args:
        programs: Programs without splitting.
        entries: Entries that the longest row may have.
        block: Entries of a tile.
        device: Where the kernel runs.

    Returns:
        What depends on shapes only, as a captured graph needs.
    """
    filling = -(-4 * multiprocessors(device) // max(programs, 1))
    least = max(1, _WORTH // (filling * block))
    # Programs without a share end at once, but tens of thousands of them take time all the same.
    shares = max(filling, min(16, 64 * multiprocessors(device) // max(programs, 1)))
    return Split(max(1, min(shares, -(-entries // (least * block)), MOST_SHARES)), least)


def split_kernel(
    kernel: str,
    programs: int,
    entries: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, Split]:
    """How a kernel that splits rows is launched.

    Args:
        kernel: A key of the table of launches.
        programs: Programs without splitting: rows times KV heads.
        entries: Pages, tokens or windows that the longest row may have.
        dim: D.
        dtype: Of the cache.
        device: Where the kernel runs.
    """
    found = launch(kernel, device, dim, dtype)
    return found, split_rows(programs, entries, found.block, device)


def row_block(rows: int) -> int:
    """Rows of a matrix product's tile: a power of two, at least the 16 that tensor cores need."""
    return max(16, triton.next_power_of_2(rows))


def dim_block(dim: int) -> int:
    """Channels of a tile: the head size rounded up to a power of two."""
    return max(16, triton.next_power_of_2(dim))
