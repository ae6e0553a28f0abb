# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forced selection, ways to fetch, what a selection looks like in memory."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from benchmarks import live
from benchmarks.gpu import decode, stages


def test_runs_of_memory_are_counted():
    slots = torch.tensor([[5, 6, 7, 1, 2, 9], [3, 4, 5, 6, 7, 8]])
    assert live.runs_of(slots).tolist() == [3, 1]


@pytest.mark.parametrize(("runs", "fine"), [(60, True), (1, False)])
def test_a_selection_that_is_one_run_of_memory_is_noticed(runs, fine):
    notes = {}
    subject = decode._Subject.__new__(decode._Subject)
    subject._options = SimpleNamespace(seed=0)
    subject._llm = SimpleNamespace(collective_rpc=lambda *_, **__: [(runs, 128)])
    subject._report = SimpleNamespace(note=notes.update)
    with contextlib.nullcontext() if fine else pytest.raises(stages.CheckFailedError):
        subject._look()
    assert notes == {"selected_runs": runs, "selected_pages": 128}


def test_prompts_of_a_gpu_are_timed_to_their_compaction(monkeypatch):
    rows = []
    monkeypatch.setattr(decode.commands, "first_two", lambda llm, prompt: [2.0, 2.5])
    monkeypatch.setattr(decode.predictions, "prefill_s", lambda *_: 1.5)
    subject = decode._Subject.__new__(decode._Subject)
    subject._options, subject._llm = SimpleNamespace(seed=0), None
    subject._shape, subject._shares_prompts = SimpleNamespace(vocab=100), False
    subject._report = SimpleNamespace(rows=rows, left_s=1e6, add=lambda **row: rows.append(row))
    assert subject._prefill(decode.Cell(256, (1,), prefills=2)) == 2.0
    times = {"prefill_s": 2.0, "second_token_s": 2.5, "predicted_s": 1.5}
    assert rows == 2 * [{"context": 256, **times}]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_forced_choices_miss_exactly_what_they_are_to(rate):
    """With frames for one working set, which the page table then has to replace in every step."""
    import torch
    from vllm_sparse.kernels.reference import sparda_paging, sparda_select
    from vllm_sparse.kernels.types import Blocks, Ranking

    from benchmarks.ops import sparda_inputs
    from vllm_sparse.policies.sparda import SpardaSettings

    settings = SpardaSettings(local_blocks=2, top_k=14, dense_len=0)
    rows, heads, width, start = 2, 2, 24, 64 * 20 + 50
    layers = [torch.randn(rows * width + 1, heads, 4, 8) for _ in range(2)]
    runtime = SimpleNamespace(
        settings=settings,
        kernels=SimpleNamespace(select_blocks=sparda_select.select_blocks),
        compressed=layers.__getitem__,
    )
    choice = live.ForcedChoice(runtime, start)
    assert choice.set_rate(rate) == round(10 * rate) / 10
    with pytest.raises(ValueError, match="too few"):
        choice.set_rate(0.9)
    table = (1 + torch.randperm(rows * width)).view(rows, width).int()
    table = torch.cat((table, torch.zeros(1, width, dtype=torch.int32)))
    blocks = Blocks(64, 16, 1, 2, 14)
    frames = sparda_inputs.empty_table((rows * width + 1) * heads, rows * heads * 14, table.device)
    for number in range(30):  # the first row crosses a block border
        positions = torch.tensor([start + number, start + number + 30, -1])
        vectors = torch.randn(3, heads, 8)
        before = int(choice.new)
        chosen = []
        for layer in layers:
            arguments = (layer, vectors, table, positions, Ranking(False), blocks)
            chosen.append(choice(*arguments, dense_len=0))
        assert torch.equal(chosen[0].pieces, chosen[1].pieces)
        selected = chosen[0]
        assert selected.pieces.dtype == torch.int32
        assert (selected.pieces[2] == -1).all()
        assert selected.pieces.shape[2] == 14
        logical = selected.blocks[:2, :, :14]
        assert all(len(set(row.tolist())) == 14 for row in logical.flatten(0, 1))
        own = positions[:2, None] // 64
        assert (logical[:, :, 0] == 0).all()
        assert (logical[:, :, -3:] == own[:, :, None] + torch.tensor([-2, -1, 0])).all()
        physical = table[:2].gather(1, logical.flatten(1).long()).view_as(logical)
        assert torch.equal(selected.pieces[:2, :, :14], physical * 2 + torch.tensor([[0], [1]]))
        step, counted = torch.tensor([number + 1]), torch.zeros(3, dtype=torch.int64)
        found = sparda_paging.resolve(frames, selected.pieces.contiguous(), step, counted)
        if number:
            assert int(found.misses) == heads * (int(choice.new) - before)
    assert int(choice.new) == rows * 30 * round(10 * rate) + 1


def test_graphs_are_found_in_both_model_runners():

    old = SimpleNamespace(model=object())
    new = SimpleNamespace(model=object(), cudagraph_manager=object())
    assert live.graphs_of(old) == (old.model, "concrete_cudagraph_entries")
    assert live.graphs_of(new) == (new.cudagraph_manager, "graphs")
    # Where this vLLM keeps them, and looks for them at replay.
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    assert "self.concrete_cudagraph_entries[" in inspect.getsource(CUDAGraphWrapper.__call__)
    assert "self.graphs[desc].replay()" in inspect.getsource(CudaGraphManager.run_fullgraph)
    assert "self.graphs[desc] = graph" in inspect.getsource(CudaGraphManager.capture)


@pytest.mark.parametrize("graphs", [True, False])
def test_each_way_to_fetch_has_graphs_of_its_own(graphs):
    """Captured once, of kernels that copy or not, and found again."""
    import torch
    from vllm_sparse.kernels.dispatch import SpardaKernels

    from benchmarks.live import Way
    from vllm_sparse.policies.sparda import SpardaSettings

    captured, copied = [], []

    class Manager:
        graphs: ClassVar[dict] = {0: "of the start"}

    def capture_model():
        fetcher.kernels.copy_pieces(None, None, None, None, "count")
        captured.append(fetcher.prefetch)
        manager.graphs[len(captured)] = "graph"

    manager = Manager()
    fields = dict.fromkeys(SpardaKernels._fields)
    fields["copy_pieces"] = lambda *arguments: copied.append(arguments[-1])
    fetcher = SimpleNamespace(kernels=SpardaKernels(**fields), prefetch=True, _lane=None)
    runtime = SimpleNamespace(
        settings=SpardaSettings(local_blocks=2, top_k=8),
        compressed=lambda layer: torch.empty(0),
        kernels=fetcher.kernels,
        fetcher=fetcher,
    )
    builder = SimpleNamespace(runtime=runtime)
    group = SimpleNamespace(get_metadata_builder=lambda: builder)
    mode = SimpleNamespace(has_full_cudagraphs=lambda: graphs)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode)),
        model_runner=SimpleNamespace(
            attn_groups=[[group]], cudagraph_manager=manager, capture_model=capture_model
        ),
    )
    at_start = manager.graphs
    live.force(worker, 2048)
    assert runtime.kernels.select_blocks is worker.steering.choice
    ways = [Way(True), Way(False), Way(True, copies=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.set_current_vllm_config", contextlib.nullcontext)
        for way in [*ways, *ways]:
            live.fetch(worker, way)
            assert fetcher.prefetch == way.prefetch
            assert list(manager.graphs) == ([1 + ways.index(way)] if graphs else [0])
    # Nobody else holds them, and with the last graph their pool would go.
    assert (worker.steering._first is at_start) == graphs
    assert captured == ([True, False, True] if graphs else [])
    assert [int(count) for count in copied[2:]] == ([0] if graphs else [])
    assert copied[:2] == (["count", "count"] if graphs else [])


def test_counters_that_reach_the_metrics_late_are_read_where_they_are():
    """On a GPU, and where a CPU walks its path: two rows of hits, misses, overflows, nothing."""
    import torch

    steering = live._Steering.__new__(live._Steering)
    counters = SimpleNamespace(readable=False, values=torch.tensor([1, 2, 0, 0, 3, 4, 0, 0]))
    steering.runtime = SimpleNamespace(
        fetcher=SimpleNamespace(counters=counters),
        pager=SimpleNamespace(geometry=SimpleNamespace(piece_bytes=10)),
    )
    expected = {"frame_hits": 4, "frame_misses": 6, "host_to_device_bytes": 60}
    assert steering.counted() == expected
