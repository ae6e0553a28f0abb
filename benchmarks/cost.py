# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a decode step of ROCKETKV should cost on a GPU, before any GPU has run it.

``python -m benchmarks.cost`` prints predicted microseconds a layer, and whole steps against stock
vLLM's, with the rest of a step as in :mod:`benchmarks.predictions`. A launch takes what it takes to
begin, and then the largest of three: the chain of things that one of its programs waits for, the
instructions of all of them, and the bytes over the bandwidth. Counts come from machine code
(``tests/benchmarks/test_cost.py`` compares them with what the compiler makes) and from shapes; the
constants of :class:`Machine` are estimates, chosen so that a former design of five launches cost
what was estimated for it (commit e6b589f has it). A measurement that disagrees says which is wrong.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu.shapes import LLAMA
from benchmarks.ops import rocketkv
from vllm_sparse.planner import bounds

if TYPE_CHECKING:
    from vllm_sparse.planner.shapes import Shape


class Machine(NamedTuple):
    """A GPU. What is not published is an estimate.

    Attributes:
        name: In tables.
        multiprocessors: How many.
        clock_ghz: Of a multiprocessor, each of whose four schedulers issues an instruction a cycle.
        bytes_per_s: That a copy of large tensors reaches.
        launch_us: From the end of a launch to the first instruction of the next, in a graph.
        overlapped_us: The same where launches overlap (programmatic dependent launch).
        memory_us: A load that no cache holds.
        cache_us: A load that the second cache holds.
        atomic_us: An atomic operation with the fence before it.
        barrier_us: A barrier within a program, with what its threads exchange across it.
        instruction_us: An instruction in the chain of one warp.
        empty_us: A program without work.
    """

    name: str = "H100 SXM"
    multiprocessors: int = 132
    clock_ghz: float = 1.7
    bytes_per_s: float = 2.85e12
    launch_us: float = 2.4
    overlapped_us: float = 1.4
    memory_us: float = 0.5
    cache_us: float = 0.25
    atomic_us: float = 0.35
    barrier_us: float = 0.035
    instruction_us: float = 0.0009
    empty_us: float = 0.0002


class Program(NamedTuple):
    """What one program does, and waits for, one after the other.

    Attributes:
        warps: It has.
        instructions: Of a warp, without those of tiles.
        per_tile: Instructions of a warp in each tile.
        barriers: Without those of tiles.
        tile_barriers: In each tile.
        memory: Loads from memory that wait for what was loaded before; one for all tiles, which
            are loaded ahead.
        cache: Such loads of what a launch shortly before has stored.
        atomics: On a counter.
    """

    warps: int
    instructions: int
    per_tile: int = 0
    barriers: int = 0
    tile_barriers: int = 0
    memory: int = 0
    cache: int = 0
    atomics: int = 0


class Launched(NamedTuple):
    """A kernel of a layer.

    Attributes:
        name: Of the kernel.
        program: What most of its programs do.
        programs: That have work.
        tiles: Of each.
        size_bytes: That cross the memory bus.
        empty: Programs without work.
        last: What those do besides that come last for a row and KV head.
        lasts: How many do.
    """

    name: str
    program: Program
    programs: int
    tiles: int = 0
    size_bytes: int = 0
    empty: int = 0
    last: Program | None = None
    lasts: int = 0


# Read off the machine code of sm_90 for heads of 128 and groups of four, bfloat16.
APPEND = Program(warps=4, instructions=1000, barriers=23, memory=1, cache=2)
SCORE = Program(
    warps=8, instructions=500, per_tile=408, barriers=8, tile_barriers=3, memory=1, cache=2,
    atomics=1,
)  # fmt: skip
SELECT = Program(warps=8, instructions=1200, barriers=28, cache=4)
ATTEND = Program(
    warps=4, instructions=700, per_tile=334, barriers=11, tile_barriers=9, memory=1, cache=2,
    atomics=1,
)  # fmt: skip
MERGE = Program(warps=4, instructions=300, barriers=12, cache=2)

TILE_PAGES, TILE_TOKENS = 128, 32


class Case(NamedTuple):
    """Tokens of each prompt, token budget, requests, longest request of the engine."""

    context: int
    budget: int
    batch: int
    longest: int = 131072 + 1536


CASES = (
    Case(16384, 1024, 1), Case(32768, 1024, 1), Case(131072, 1024, 1), Case(32768, 256, 64),
)  # fmt: skip
BLOCK_SIZE = 64
# Of the targets, which are for one H200; stock vLLM's largest batch of 32K is 27 there.
H200_BYTES_PER_S = 4.2e12
STEPS = (
    Case(16384, 1024, 1), Case(32768, 1024, 1), Case(131072, 1024, 1), Case(32768, 1024, 27),
)  # fmt: skip


def microseconds_of(program: Program, tiles: int, machine: Machine) -> float:
    """What one program takes that has a multiprocessor to itself, in microseconds."""
    instructions = program.instructions + tiles * program.per_tile
    barriers = program.barriers + tiles * program.tile_barriers
    return (
        instructions * machine.instruction_us
        + barriers * machine.barrier_us
        + program.memory * machine.memory_us
        + program.cache * machine.cache_us
        + program.atomics * machine.atomic_us
    )


def microseconds(kernel: Launched, machine: Machine, overlapped: bool) -> float:
    """What a kernel adds to a layer.

    Args:
        kernel: How it is launched.
        machine: Where.
        overlapped: Launches may begin while the one before ends.
    """
    last = kernel.last
    chain = microseconds_of(kernel.program, kernel.tiles, machine)
    one = kernel.program.instructions + kernel.tiles * kernel.program.per_tile
    issued = kernel.programs * kernel.program.warps * one
    if last is not None and kernel.lasts:
        chain += microseconds_of(last, 0, machine)
        issued += kernel.lasts * last.warps * last.instructions
    issue = issued / (machine.multiprocessors * 4 * machine.clock_ghz * 1e3)
    moved = 1e6 * kernel.size_bytes / machine.bytes_per_s
    begin = machine.overlapped_us if overlapped else machine.launch_us
    return begin + max(chain, issue, moved) + kernel.empty * machine.empty_us


def split_of(case: Case, shape: Shape = LLAMA) -> bounds.Split:
    """What ROCKETKV holds and reads of one request."""
    settings = {**rocketkv.SETTINGS, "token_budget": case.budget}
    return rocketkv.split_of(shape, case.context, settings, BLOCK_SIZE)


def layer(
    case: Case, machine: Machine, shape: Shape = LLAMA, split: bounds.Split | None = None
) -> list[Launched]:
    """The launches of a layer; what is held and read of a request is the default unless given."""
    from benchmarks.ops import kernels

    grid, split = kernels.grid(), split or split_of(case, shape)
    pairs = case.batch * shape.kv_heads
    pages, most_pages = (-(-n // split.page_size) for n in (split.held, case.longest))
    tiles = -(-pages // TILE_PAGES)
    slots = {
        name: grid.programs_at_once(name, 2 * shape.head_dim, machine.multiprocessors)
        for name in ("select_slots", "attend")
    }
    shares = grid.whole_waves(slots["select_slots"], pairs, -(-most_pages // TILE_PAGES))
    size = -(-tiles // min(shares, tiles))
    used = -(-tiles // size)
    select = Launched(
        "score + select", SCORE, pairs * used, size,
        bounds.score_bytes(shape, case.batch, split), empty=pairs * (shares - used),
        last=SELECT, lasts=pairs,
    )  # fmt: skip
    read = min(split.top_k, split.held)
    tiles = -(-read // TILE_TOKENS)
    found = grid.grid_of(
        slots["attend"], pairs, read, case.longest, TILE_TOKENS, machine.multiprocessors
    )
    size = max(-(-tiles * pairs // found.programs), -(-tiles // found.shares))
    used = -(-tiles // size)
    working = min(found.programs, pairs * used)
    attend = Launched(
        "attend + merge", ATTEND, working, -(-tiles * pairs // working),
        bounds.attend_bytes(shape, case.batch, read), empty=found.programs - working,
        last=MERGE, lasts=pairs if used > 1 else 0,
    )  # fmt: skip
    append = Launched(
        "append + rank", APPEND, pairs,
        size_bytes=rocketkv.append_bytes(shape, case.batch, split.page_size),
    )  # fmt: skip
    return [append, select, attend]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__).parse_args(
        arguments
    )
    machine = Machine()
    print(f"{machine.name}, {LLAMA.name}, estimates: microseconds a layer")
    for case in CASES:
        print(f"\n{case.context} tokens, t = {case.budget}, batch {case.batch}")
        launched = layer(case, machine)
        for title, overlapped in (("three launches", False), ("three launches, overlapped", True)):
            times = [microseconds(kernel, machine, overlapped) for kernel in launched]
            parts = ", ".join(
                f"{kernel.name} {time:.1f}" for kernel, time in zip(launched, times, strict=True)
            )
            print(f"  {title:<27}{sum(times):>6.1f}  ({parts})")
    _print_steps(Machine(name="H200 SXM", bytes_per_s=H200_BYTES_PER_S))


def _print_steps(machine: Machine) -> None:
    from benchmarks import predictions  # which counts by this module

    print(f"\n{machine.name}, {LLAMA.name}, estimates: milliseconds a decode step, x stock vLLM's")
    for case in STEPS:
        stock, serial, overlapped = (
            predictions.step_ms(
                LLAMA, case.batch, case.context, split, case.longest,
                predictions.Expected(machine, late),
            )
            for split, late in ((None, False), (split_of(case), False), (split_of(case), True))
        )  # fmt: skip
        print(
            f"  {case.context:>6} tokens, batch {case.batch:>2}: stock {stock:.2f}, three launches "
            f"{serial:.2f} ({stock / serial:.2f}x), overlapped {overlapped:.2f} "
            f"({stock / overlapped:.2f}x)"
        )


if __name__ == "__main__":
    main()
