# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Sizes of the host pool and the slab, and the advice of errors about them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.geometry import (
    GIB,
    Geometry,
    block_bytes,
    blocks_per_row,
    fit_slab,
    host_blocks,
    plan_frames,
)
from vllm_sparse.policies.sparda import SpardaSettings


def small(**changes) -> SpardaSettings:
    return SpardaSettings(
        **{
            "selector": "query",
            "block_size": 16,
            "kernel_stride": 4,
            "local_blocks": 2,
            "top_k": 6,
            "dense_len": 64,
            **changes,
        }
    )


PLAN = {
    "num_layers": 4,
    "num_pieces": 2000,
    "num_kv_heads": 2,
    "piece_bytes": 1 << 20,
    "max_num_seqs": 8,
    "max_model_len": 1024,
}


class TestHostBlocks:
    def test_as_many_as_fit(self):
        each = block_bytes(num_layers=4, num_kv_heads=2, block_size=16, head_dim=8, itemsize=2)
        assert each == 4 * 2 * 16 * (8 + 8) * 2
        assert host_blocks(small(host_gib=100.9 * each / GIB), each, 16 * 16) == 100
        assert host_blocks(small(host_gib=100 * each / GIB), each, 99 * 16) == 100

    def test_too_few_for_one_request(self):
        """99 blocks of tokens and vLLM's null block."""
        with pytest.raises(ConfigError) as error:
            host_blocks(small(host_gib=100 / 1024), 1 << 20, 99 * 16 + 1)
        for part in ("vllm_sparse.host_gib", "hold 100 blocks", "16 tokens", "1024 KiB", "1585",
                     "needs 101", "--max-model-len"):  # fmt: skip
            assert part in str(error.value), part

    @given(st.integers(1, 1 << 26), st.integers(1, 200_000))
    @hypothesis_settings(max_examples=200, deadline=None)
    def test_the_advice_helps(self, bytes_per_block, max_model_len):
        with pytest.raises(ConfigError) as error:
            host_blocks(small(host_gib=1e-9), bytes_per_block, max_model_len)
        advised = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
        host_blocks(small(host_gib=advised), bytes_per_block, max_model_len)


class TestPlanFrames:
    def test_unset_is_twice_the_working_set(self):
        """8 rows, 2 heads, 6 blocks."""
        assert plan_frames(small(), **PLAN) == (192,) * 4

    def test_never_more_than_all(self):
        assert plan_frames(small(), **{**PLAN, "num_pieces": 150}) == (150,) * 4
        assert plan_frames(small(slab_gib=64), **PLAN) == (2000,) * 4

    def test_dense_rows_read_more_than_selected_ones(self):
        assert blocks_per_row(small(), 1024) == 6
        assert blocks_per_row(small(dense_len=97), 1024) == 7
        assert blocks_per_row(small(dense_len=8192), 1024) == 64
        assert blocks_per_row(small(top_k=80), 1000) == 63
        assert plan_frames(small(dense_len=97), **PLAN) == (2 * 8 * 2 * 7,) * 4

    def test_resident(self):
        assert plan_frames(small(resident=True), **PLAN) == (2000,) * 4
        first = plan_frames(small(resident_first_layer=True), **PLAN)
        assert first == (2000, 192, 192, 192)
        geometry = Geometry(4, 1000, 2, 16, 8, 2, first)
        assert [geometry.is_resident(layer) for layer in range(4)] == [True, False, False, False]
        assert geometry.piece_bytes == 16 * 16 * 2
        assert geometry.slab_bytes == (2000 + 3 * 192) * geometry.piece_bytes

    def test_a_given_slab_is_divided_among_the_layers(self):
        assert plan_frames(small(slab_gib=0.5), **PLAN) == (128,) * 4
        settings = small(slab_gib=(2000 + 3 * 100) / 1024, resident_first_layer=True)
        assert plan_frames(settings, **PLAN) == (2000, 100, 100, 100)

    @pytest.mark.parametrize(
        ("changes", "least_mib", "parts"),
        [
            ({}, 4 * 96, ["96 frames in each of 4 layers,"]),
            ({"resident_first_layer": True}, 2000 + 3 * 96, ["3 layers + 2000 of the resident"]),
        ],
    )
    def test_a_slab_too_small_for_a_step(self, changes, least_mib, parts):
        least = least_mib / 1024
        plan_frames(small(slab_gib=least, **changes), **PLAN)
        with pytest.raises(ConfigError) as error:
            plan_frames(small(slab_gib=least - 1 / 2048, **changes), **PLAN)
        for part in (
            "vllm_sparse.slab_gib",
            "--max-num-seqs 8 x 2 KV heads x 6 blocks = 96 frames",
            "1024 KiB",
            f"{math.ceil(1000 * least) / 1000:.3f} GiB",
            "dense_len",
            *parts,
        ):
            assert part in str(error.value), part

    @example(1999, 1, 1, True, 1)
    @example(2000, 1, 1, True, 1)
    @example(4000, 1, 2, False, 1000)
    @given(
        st.integers(0, 9000),
        st.integers(1, 2000),
        st.integers(1, 6),
        st.booleans(),
        st.integers(1, 1000),
    )
    @hypothesis_settings(max_examples=200, deadline=None)
    def test_what_there_is_room_for(self, room, top_k, layers, first, asked):
        """The slab fits the room, a step fits the slab, and one request more would not."""
        settings = small(top_k=top_k + 4, resident_first_layer=first)
        where = {**PLAN, "num_layers": layers, "max_num_seqs": asked}
        piece, per_row = PLAN["piece_bytes"], 2 * blocks_per_row(settings, 1024)
        try:
            slab, requests = fit_slab(settings, room_bytes=room * piece, **where)
        except ConfigError:
            assert room < 2000 * first + (layers - first) * per_row
            return
        chosen = settings.model_copy(update={"slab_gib": slab / GIB})
        frames = plan_frames(chosen, **{**where, "max_num_seqs": requests})
        assert sum(frames) * piece == slab
        assert 1 <= requests <= asked
        assert slab <= room * piece
        if frames[-1] == 2000:
            assert requests == asked
        else:
            assert room * piece < slab + layers * piece
            assert requests == asked or frames[-1] < (requests + 1) * per_row

    @given(st.integers(1, 64), st.integers(1, 40), st.booleans(), st.integers(1, 1 << 22))
    @hypothesis_settings(max_examples=200, deadline=None)
    def test_the_advice_helps(self, max_num_seqs, layers, first, piece_bytes):
        where = {**PLAN, "max_num_seqs": max_num_seqs, "piece_bytes": piece_bytes}
        where["num_layers"] = layers + first
        with pytest.raises(ConfigError) as error:
            plan_frames(small(slab_gib=1e-12, resident_first_layer=first), **where)
        advised = float(re.search(r"are ([\d.]+) GiB", str(error.value))[1])
        frames = plan_frames(small(slab_gib=advised, resident_first_layer=first), **where)
        assert frames[-1] >= min(max_num_seqs * 2 * 6, 2000)
