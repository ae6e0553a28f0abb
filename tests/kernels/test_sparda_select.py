# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which blocks decode rows read: every implementation against the reference and the policy."""

from __future__ import annotations

import itertools
import platform
import time

import pytest
import torch
from support.kernels import (
    DEVICE,
    FAR,
    FLOATS,
    REFERENCE,
    device_of,
    noise,
    scattered_table,
    use_tile,
    with_gaps,
)
from support.kernels import (
    sparda as kernels_called,
)
from vllm_sparse.kernels.reference.sparda_select import gather_windows
from vllm_sparse.kernels.types import Blocks, Ranking, Rotary

from vllm_sparse.policies import sparda

RANKINGS = {
    "forecast": Ranking(False),
    "query": Ranking(True, 0.2),
    "previous": Ranking(True, 0.2, lag=1),
}
SELECTIONS = [
    # dtype, D, heads per KV head, block size
    (torch.float32, 64, 1, 64),
    (torch.bfloat16, 128, 16, 64),
    (torch.float16, 80, 7, 32),
    (torch.bfloat16, 96, 3, 128),
    (torch.float32, 256, 2, 16),
]


def make_selection(device, dtype, dim, group, size, ranking, whole, width=40, local=2):
    """Rows at every border; all memory that none of them may read is NaN."""
    generator = torch.Generator().manual_seed(dim)
    blocks = Blocks(size, 16, init_blocks=1, local_blocks=local, top_k=local + 7)
    dense = (blocks.top_k + 3) * size - 5
    positions = torch.tensor([
        -1, 0, size - 1, blocks.top_k * size - 1, blocks.top_k * size,
        dense - 1, dense, 20 * size, 21 * size - 1, 30 * size + 15, width * size - 1,
    ])  # fmt: skip
    rows, kv_heads, windows = len(positions), 2, size // 16
    table = scattered_table(rows, width, generator, device)
    shape = (rows * width, kv_heads, windows, dim)
    compressed = with_gaps(
        noise(*shape, generator=generator, device=device, dtype=dtype, whole=whole), 3
    )
    for row, position in enumerate(positions.tolist()):
        # Windows that are not complete: they end in (n + 1) * 16 - 1. The first is none at all.
        complete = max((position - ranking.lag + 1) // 16, 0)
        slots = compressed[table[row].long()].transpose(1, 2).flatten(0, 1)  # a copy
        slots[0] = slots[complete:] = torch.nan
        slots = slots.unflatten(0, (width, windows)).transpose(1, 2)
        compressed[table[row].long()] = slots
        table[row, max(position // size + 1, 0) :] = FAR
    heads = kv_heads * group if ranking.softmax else kv_heads
    vectors = noise(
        rows, heads + 1, dim, generator=generator, device=device, dtype=dtype, whole=whole
    )
    return compressed, vectors[:, :heads], table, positions.to(device), blocks, dense


# Every shape with every ranking; any two values of shape, ranking, tile and programs meet.
CASES = [
    (shape, kind, (32, 64)[i % 2], (1, 24)[i // 2 % 2])
    for i, (shape, kind) in enumerate(itertools.product(SELECTIONS, RANKINGS))
]


@pytest.mark.parametrize(("shape", "kind", "tile", "programs"), CASES)
def test_selection_equals_reference(ours, shape, kind, tile, programs, monkeypatch):
    """Rows have 11 to 40 blocks: up to a quarter of a tile, up to a tile, and several."""
    launch = pytest.importorskip("vllm_sparse.kernels.triton.launch")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: programs)
    use_tile(monkeypatch, "choose_blocks", tile)
    ranking = RANKINGS[kind]
    # Whole numbers tie often. Probabilities are sums that depend on their order.
    whole = not ranking.softmax
    *inputs, blocks, dense = make_selection(device_of(ours), *shape, ranking, whole)
    options = {} if kind == "previous" else {"dense_len": dense}
    arguments = (*inputs, ranking, blocks)
    expected = REFERENCE.select_blocks(*arguments, **options)
    actual = ours.select_blocks(*arguments, **options)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert a.equal(b), name
        assert a.dtype == torch.int32
    assert (actual.blocks[0] == -1).all()
    assert actual.lengths[0] == 0


@pytest.mark.parametrize("halves", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize(
    ("dtype", "dim", "turning"),
    [(torch.float32, 64, 64), (torch.bfloat16, 80, 80), (torch.float16, 96, 40)],
)
def test_vectors_turn_by_their_positions(ours, halves, dtype, dim, turning):
    """Those of the model's rotary embedding, in a cache whose rows are further apart."""
    device, size = device_of(ours), 32
    *inputs, blocks, _ = make_selection(device, dtype, dim, 1, size, Ranking(False), False)
    angle = torch.outer(
        torch.arange(float(40 * size)), 100.0 ** -(torch.arange(0, turning, 2) / turning)
    )
    cache = with_gaps(torch.cat((angle.cos(), angle.sin()), -1).to(device, dtype), 2)
    ranking = Ranking(False, rotary=Rotary(cache, halves))
    expected = REFERENCE.select_blocks(*inputs, ranking, blocks)
    actual = ours.select_blocks(*inputs, ranking, blocks)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert a.equal(b), name
    for other in (Ranking(False), Ranking(False, rotary=Rotary(cache, not halves))):
        assert not ours.select_blocks(*inputs, other, blocks).blocks.equal(expected.blocks)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", RANKINGS)
@pytest.mark.parametrize(("dim", "group", "windows"), [(64, 1, 4), (24, 3, 2), (128, 16, 8)])
def test_selection_agrees_with_the_policy(every, dtype, kind, dim, group, windows):
    """Random rows; sums in another order may swap near-ties."""
    ranking, device = RANKINGS[kind], device_of(every)
    generator = torch.Generator().manual_seed(dim)
    kv_heads, rows, width, size = 2, 7, 40, 16 * windows
    blocks = Blocks(size, 16, init_blocks=1, local_blocks=2, top_k=9)
    table = torch.randperm(rows * width, generator=generator).view(rows, width)
    positions = torch.randint(10 * size, width * size, (rows,), generator=generator)
    positions[:4] = torch.tensor([0, 3 * size - 1, 3 * size, 20 * size + 15])
    compressed = torch.randn(rows * width, kv_heads, windows, dim, generator=generator).to(dtype)
    for row, position in enumerate(positions.tolist()):
        complete = max((position - ranking.lag + 1) // 16, 0)
        slots = compressed[table[row]].transpose(1, 2).flatten(0, 1)  # a copy
        slots[0] = slots[complete:] = torch.nan
        compressed[table[row]] = slots.unflatten(0, (width, windows)).transpose(1, 2)
    heads = kv_heads * group if ranking.softmax else kv_heads
    vectors = torch.randn(rows, heads, dim, generator=generator).to(dtype)
    chosen = every.select_blocks(
        compressed.to(device), vectors.to(device), table.int().to(device), positions.to(device),
        ranking, blocks,
    ).blocks.cpu()  # fmt: skip
    expected = torch.full_like(chosen, -1)
    for row, position in enumerate(positions.tolist()):
        at = positions[row : row + 1]
        keys = gather_windows(compressed, table[row, : position // size + 1])
        if ranking.softmax:
            scores = sparda.query_scores(
                vectors[row, :, None], keys, at - ranking.lag, scale=ranking.scale
            )
        else:
            scores = sparda.forecast_scores(vectors[row, :, None], keys.nan_to_num(-torch.inf))
        best = sparda.select_blocks(
            scores.nan_to_num(-torch.inf), at, **blocks._asdict()
        )[:, 0]  # fmt: skip
        expected[row] = best
    assert (chosen == expected).all(-1).float().mean() > 0.9, (chosen, expected)
    assert ((chosen >= 0).sum(-1) == (expected >= 0).sum(-1)).all()


def test_rows_whose_logits_would_be_too_many_take_turns(monkeypatch):
    launch = pytest.importorskip("vllm_sparse.kernels.triton.launch")
    from vllm_sparse.kernels.triton import sparda_scores, sparda_select

    ranking = RANKINGS["query"]
    *inputs, blocks, dense = make_selection(DEVICE, *SELECTIONS[1], ranking, whole=False)
    arguments = (*inputs, ranking, blocks)
    expected = sparda_select.select_blocks(*arguments, dense_len=dense)
    monkeypatch.setattr(sparda_scores, "_MOST_LOGITS", 1)
    sizes = []

    def split_kernel(kernel, programs, *args):
        sizes.append(programs)
        return launch.launch(kernel, DEVICE), launch.Split(1, 1)

    monkeypatch.setattr(sparda_scores, "split_kernel", split_kernel)
    actual = sparda_select.select_blocks(*arguments, dense_len=dense)
    assert sizes == [4 * 2]  # rows at once, KV heads
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", ["forecast", "query"])
def test_equal_scores_favour_the_earlier_block(every, kind):
    device = device_of(every)
    compressed = torch.ones(30, 1, 4, 64, device=device)
    table = torch.arange(30, dtype=torch.int32, device=device)[None]
    chosen = every.select_blocks(
        compressed, torch.ones(1, 1, 64, device=device), table,
        torch.tensor([29 * 64], device=device), RANKINGS[kind], Blocks(64, 16, 1, 1, 6),
    )  # fmt: skip
    assert chosen.blocks.tolist() == [[[0, 1, 2, 3, 28, 29]]]


def test_a_window_scores_both_blocks_that_it_overlaps(every):
    """Window 4m - 1 is stored with block m but begins in the one before."""
    device = device_of(every)
    compressed = torch.zeros(30, 1, 4, 64, device=device)
    compressed[12, 0, 0] = 1.0  # overlaps blocks 11 and 12
    compressed[20, 0, 3] = 2.0  # lies in block 20
    table = torch.arange(30, dtype=torch.int32, device=device)[None]
    chosen = every.select_blocks(
        compressed, torch.ones(1, 1, 64, device=device), table,
        torch.tensor([29 * 64], device=device), Ranking(False), Blocks(64, 16, 1, 1, 6),
    )  # fmt: skip
    assert chosen.blocks.tolist() == [[[0, 11, 12, 20, 28, 29]]]


def test_selection_without_rows_or_without_a_choice(every):
    ranking, device = RANKINGS["query"], device_of(every)
    *inputs, blocks, _ = make_selection(device, *SELECTIONS[0], ranking, whole=False)
    compressed, vectors, table, positions = inputs
    none = every.select_blocks(compressed, vectors[:0], table[:0], positions[:0], ranking, blocks)
    assert none.blocks.shape == (0, 2, blocks.top_k)
    few = slice(1, 4)
    for given in (vectors[few], None):
        chosen = every.select_blocks(
            compressed, given, table[few, :9], positions[few].int(), ranking, blocks
        )
        assert chosen.blocks[:, 0].tolist() == [
            [0] + 8 * [-1], [0] + 8 * [-1], list(range(9)),
        ]  # fmt: skip
        assert chosen.lengths.tolist() == [1, 64, 9 * 64]


@pytest.fixture
def one_thread():
    """Threads that wait count as time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="measured there only")
def test_a_group_s_heads_share_each_reading_of_the_keys(one_thread):
    """Least CPU time of many, beside that of one vector per KV head over the same keys."""
    generator = torch.Generator().manual_seed(0)
    kv_heads, dim, count = 4, 128, 256
    compressed = torch.randn(count, kv_heads, 4, dim, generator=generator).bfloat16()
    table = torch.randperm(count, generator=generator).int()[None]
    vectors = torch.randn(1, 4 * kv_heads, dim, generator=generator).bfloat16()
    seconds = dict.fromkeys((True, False), 1.0)
    for softmax in 40 * tuple(seconds):
        of = vectors if softmax else vectors[:, :kv_heads]
        started = time.process_time()
        kernels_called("cpu").select_blocks(
            compressed, of, table, torch.tensor([count * 64 - 1]), Ranking(softmax, 0.1),
            Blocks(64, 16, 1, 2, 32),
        )  # fmt: skip
        seconds[softmax] = min(seconds[softmax], time.process_time() - started)
    assert seconds[True] < 2.2 * seconds[False], seconds
