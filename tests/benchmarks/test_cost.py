# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The cost model, and whether machine code is what it takes it for."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from support.ahead_of_time import compiled, machine_code
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.triton import decode, grid, pages

from benchmarks import cost
from benchmarks.gpu.shapes import LLAMA

SHARED = {80: 163 << 10, 90: 227 << 10}  # of a multiprocessor
REGISTERS = 1 << 16


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_what_the_model_rests_on(capability, triton_cache):
    """Compiled for batch 1, 32 query and 8 KV heads of 128 channels, bfloat16."""
    append, select, attend = machine_codes(capability, LLAMA.head_dim, triton_cache)
    found = [append["kernel"], select["kernel"], attend["kernel"]]
    assert found == ["_append_kernel", "_select_slots_kernel", "_attend_kernel"]
    # Launches overlap where the architecture has it; every program waits once.
    for code in (append, select, attend):
        assert code["overlapped"] is (capability >= 90)
        assert code["waits"] == (1 if capability >= 90 else 0), code
        # At most a few numbers that are put away before the tiles and taken up again behind them.
        assert code["stack"] <= 16, code
        assert code["spills"] <= (2 if capability >= 90 else 5), code
        assert code["tile_spills"] == 0, code
    assert (append["counters"], select["counters"], attend["counters"]) == (0, 1, 1)
    assert fits(capability, LLAMA.head_dim, select, attend)
    # Nor may another compiler take more.
    assert [code["most_registers"] for code in (append, select, attend)] == [None, 128, 128]
    # Loops over tiles: what is waited for, how much is issued, and in what pieces it is loaded.
    for code, program in ((select, cost.SCORE), (attend, cost.ATTEND)):
        assert code["warps"] == program.warps
        assert code["tile_barriers"] <= program.tile_barriers, code
        assert code["tile_instructions"] <= 1.15 * program.per_tile, code
        assert 2 * code["tile_copies_of_16"] > code["tile_copies"] > 0, code
    assert select["before_tiles"] <= 1, select
    assert attend["before_tiles"] <= 6, attend  # five of them before it waits for the launch before
    assert append["barriers"] <= cost.APPEND.barriers
    assert append["instructions"] <= 1.3 * cost.APPEND.instructions
    assert append["warps"] == cost.APPEND.warps


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [192, 256])
def test_large_heads_leave_room_for_fewer_programs(head_dim, triton_cache):
    _, select, attend = machine_codes(90, head_dim, triton_cache)
    assert fits(90, head_dim, select, attend)
    assert fits(80, head_dim, select, attend)  # same shared memory, fewer bytes of it
    assert not fits(90, LLAMA.head_dim, select, attend)


def machine_codes(capability: int, head_dim: int, cache: object) -> list[dict[str, Any]]:
    """What `machine_code` tells of the kernels of a step."""
    lines = compiled(__file__, f"{capability},{head_dim}", cache)
    return [json.loads(line) for line in lines if line.startswith("{")]


def fits(capability: int, head_dim: int, select: dict[str, Any], attend: dict[str, Any]) -> bool:
    """Whether a multiprocessor holds as many programs at once as the grids take for granted."""
    found = True
    for name, code in (("select_slots", select), ("attend", attend)):
        resident = grid.programs_at_once(name, 2 * head_dim, 1)
        found &= resident * code["registers"] * 32 * code["warps"] <= REGISTERS
        found &= resident * (code["shared"] + 1024) <= SHARED[capability]
    return found


def test_the_model_takes_what_is_launched():
    assert decode.launch("select_slots", torch.device("cpu"), 128).block == cost.TILE_PAGES
    assert decode.launch("attend", torch.device("cpu"), 128).block == cost.TILE_TOKENS
    case = cost.CASES[1]
    append, select, attend = cost.layer(case, cost.Machine())
    assert append.programs == 8
    assert select.programs + select.empty == 8 * pages.whole_waves(2 * 132, 8, 1040)
    assert (attend.programs, attend.tiles, attend.empty) == (8 * 16, 1, 4)


@pytest.mark.parametrize(
    ("case", "serial", "overlapped"), [(cost.CASES[1], 19.7, 16.7), (cost.CASES[3], 37.3, 34.3)]
)
def test_a_layer_costs_what_the_page_says(case, serial, overlapped):
    """It keeps the estimates of docs/kernels.md and shows nothing of a GPU."""
    machine = cost.Machine()
    for late, said in ((False, serial), (True, overlapped)):
        found = sum(cost.microseconds(k, machine, late) for k in cost.layer(case, machine))
        assert found == pytest.approx(said, abs=0.06)


def test_bytes_bound_what_reads_much():
    """With an infinitely fast chain and issue, a kernel takes what its bytes take."""
    machine = cost.Machine(bytes_per_s=1e9, launch_us=0.0)
    (kernel,) = [k for k in cost.layer(cost.CASES[-1], machine) if k.name == "attend + merge"]
    bound = 1e6 * kernel.size_bytes / 1e9 + kernel.empty * machine.empty_us
    assert cost.microseconds(kernel, machine, False) == pytest.approx(bound)
    assert cost.microseconds(kernel._replace(size_bytes=0), machine, False) < bound


def test_the_tables_are_printed(capsys):
    cost.main([])
    printed = capsys.readouterr().out
    assert printed.count("three launches, overlapped") == len(cost.CASES)
    assert "estimates" in printed
    for row in (
        r"16384 tokens, batch  1: .* 4\.90 \(1\.02x\), overlapped 4\.80 \(1\.04x\)",
        r"32768 tokens, batch  1: .* 4\.90 \(1\.13x\), overlapped 4\.80 \(1\.15x\)",
        r"131072 tokens, batch  1: .* 4\.90 \(1\.75x\), overlapped 4\.80 \(1\.79x\)",
        r"32768 tokens, batch 27: .* 5\.45 \(5\.89x\), overlapped 5\.35 \(6\.00x\)",
    ):
        assert re.search(row, printed), "docs/kernels.md has these numbers"


def launch_a_step(dim: int) -> None:
    """One decode step of one request."""
    layout, heads, kv_heads = PageLayout(64, dim, 4), 32, 8
    cache = torch.zeros(9, kv_heads, 64, 2 * dim + 2 * dim // 4, dtype=torch.bfloat16)
    query, key = torch.zeros(1, heads, dim).bfloat16(), torch.zeros(1, kv_heads, dim).bfloat16()
    table, lengths = torch.zeros(1, 2048, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    decode.decode_attention(
        cache, query, key, key, query, table, lengths, lengths, lengths, layout=layout, top_k=512,
        scale=0.1, replays=False, parked=lengths, per_block=8,
    )  # fmt: skip


if __name__ == "__main__":
    capability, head_dim = (int(part) for part in sys.argv[1].split(","))
    machine_code(capability)
    launch_a_step(head_dim)
