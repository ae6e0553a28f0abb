# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How many launches a layer of SPARDA takes when it decodes, PyTorch's operations included.

And whether the fewest of them still choose by the right queries.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support import adversary
from support.capture import Operations, capturing
from support.kernels import DEVICE, sparda
from vllm_sparse.kernels.types import Rotary

from vllm_sparse.kv.host.geometry import Geometry
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.policies.selectors import ForecastSelector, PreviousSelector
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.prefetch.fetcher import Fetcher
from vllm_sparse.prefetch.lane import LateLane
from vllm_sparse.prefetch.stream import PromptStream
from vllm_sparse.steps.host import SpardaPlanner
from vllm_sparse.steps.host_layer import Layer, Runtime
from vllm_sparse.steps.host_rows import RowPlanner

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts in the interpreter")

LAYERS, ROWS, KV_HEADS, HEADS, DIM, SIZE, WIDTH = 3, 2, 2, 4, 32, 32, 12
SETTINGS = SpardaSettings(
    selector="lookahead-query", block_size=SIZE, kernel_stride=16, init_blocks=1, local_blocks=1,
    top_k=4, dense_len=0, sparse_prefill=True,
)  # fmt: skip

BY_QUERIES = SETTINGS.model_copy(update={"selector": "previous"})


def make_layers(settings: SpardaSettings, with_selector: Callable[..., Any]) -> list[Layer]:
    """A model's layers on the path of a GPU, of whose frames one step needs nearly all.

    Args:
        settings: SPARDA's.
        with_selector: Makes the selector, of kernels and the pool's blocks.
    """
    blocks = ROWS * WIDTH + 1
    geometry = Geometry(LAYERS, blocks, KV_HEADS, SIZE, DIM, 4, (20,) * LAYERS)
    pager, kernels, lane = Pager(geometry, torch.float32), sparda("triton"), LateLane()
    pager.host.normal_()
    caches = [
        SimpleNamespace(kv_cache=torch.randn(blocks, KV_HEADS, 1, SIZE // 16 * DIM))
        for _ in range(LAYERS)
    ]
    fetcher = Fetcher(pager, kernels, lane, lambda *_: None, captured=True)
    stream = PromptStream(pager, kernels, lane, 2, lambda *_: None, captured=True)
    selector = with_selector(kernels, blocks)
    runtime = Runtime(settings, 0.2, pager, kernels, selector, fetcher, stream, caches)
    return [Layer(runtime, number) for number in range(LAYERS)]


def forecast(kernels, blocks: int) -> ForecastSelector:
    values = torch.randn(8, 2, KV_HEADS, DIM)
    taps = [SimpleNamespace(values=values[:, : 1 + (n == 0)]) for n in range(LAYERS - 1)]
    return ForecastSelector([*taps, None], Rotary(torch.randn(SIZE * WIDTH, DIM), True))


def previous(kernels, blocks: int, captured: bool = True) -> PreviousSelector:
    kept, recent = (torch.randn(LAYERS, n, HEADS, DIM) for n in (blocks, ROWS))
    own = kernels.record_queries, kernels.recall_queries
    return PreviousSelector(0.2, kept, SIZE, *own, recent if captured else None)


def step_of(settings: SpardaSettings, with_selector: Callable[..., Any], monkeypatch) -> list[Any]:
    """Kernels and PyTorch's operations of each layer's decode step."""
    layers = make_layers(settings, with_selector)
    monkeypatch.setattr(adversary, "_THOROUGH", 0)
    for name in ("empty", "empty_like"):  # unpoisoned: that is no launch of ours
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    # One row completes a window.
    lengths = torch.tensor([SIZE * WIDTH - 3, SIZE * WIDTH - 16]).int()
    table = torch.arange(1, 1 + ROWS * WIDTH).view(ROWS, WIDTH).int()
    planner = SpardaPlanner(settings, 1 + ROWS * WIDTH, lambda *_: None)
    rows = RowPlanner(settings, ROWS, torch.device("cpu"), captured=True)
    step = rows.plan(planner, lengths, lengths, torch.tensor([5, 5]), table, False)
    query, key, value = (torch.randn(ROWS, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    output = torch.empty(ROWS, HEADS, DIM)
    found = []
    for layer in layers:
        before = Counter(adversary.LAUNCHES)
        with capturing(), Operations() as operations:
            layer.run(query, key, value, step, output)
        found.append((adversary.LAUNCHES - before, operations.found))
    assert bool(output.isfinite().all())
    return found


def test_a_layer_takes_seven_launches_and_its_tap_one(monkeypatch):
    """Forecast, choice, two for the page table, copy, write, attention."""
    found = step_of(SETTINGS, forecast, monkeypatch)
    kernels = (
        "_forecast_kernel", "_choose_kernel", "_look_up_kernel", "_fill_kernel", "_copy_kernel",
        "_write_tokens_kernel", "_attend_frames_kernel",
    )  # fmt: skip
    assert found[1] == (dict.fromkeys(kernels, 1), {})  # chooses for the layer after it
    chosen = kernels[:5]
    assert found[0][0] == {
        **dict.fromkeys(kernels, 1),
        **dict.fromkeys(chosen[:4], 2),
        "_copy_kernel": 1,
    }
    assert found[2][0] == {"_copy_kernel": 1, "_write_tokens_kernel": 1, "_attend_frames_kernel": 1}


def test_a_layer_takes_eight_launches_with_the_default_selector(monkeypatch):
    """Logits and softmax in place of a Forecast's one; queries are kept as tokens are written.

    One launch a step finds them again, for all layers.
    """
    found = step_of(BY_QUERIES, previous, monkeypatch)
    chosen = [f"_{name}_kernel" for name in ("logits", "softmax", "choose", "look_up", "fill")]
    others = [f"_{name}_kernel" for name in ("copy", "write_tokens", "attend_frames")]
    assert found[1] == (dict.fromkeys((*chosen, *others), 1), {})
    assert len(found[1][0]) == 8
    assert found[0][0] == {
        **dict.fromkeys(chosen, 2),
        **dict.fromkeys(others, 1),
        "_recall_queries_kernel": 1,
    }
    assert found[2][0] == dict.fromkeys(others, 1)
    assert sum(launches.total() for launches, _ in found) == 8 * LAYERS + 1


@pytest.mark.parametrize("captured", [False, True])
def test_every_layer_chooses_by_its_queries_of_the_step_before(captured):
    """Rows that swap places, rows after a prompt's batch, and what is written meanwhile."""
    layers = make_layers(BY_QUERIES, lambda *args: previous(*args, captured))
    runtime, vectors = layers[0].runtime, []
    select = runtime.kernels.select_blocks

    def watching(compressed, given, *rest, **options):
        vectors.append(given.clone())
        return select(compressed, given, *rest, **options)

    runtime.kernels = runtime.kernels._replace(select_blocks=watching)
    planner = SpardaPlanner(BY_QUERIES, 1 + ROWS * WIDTH, lambda *_: None)
    rows = RowPlanner(BY_QUERIES, ROWS, torch.device("cpu"), captured)
    table = torch.arange(1, 1 + ROWS * WIDTH).view(ROWS, WIDTH).int()
    # The second token of the first request begins a block.
    lengths, before = torch.tensor([SIZE * (WIDTH - 2), SIZE * WIDTH - 16]).int(), None
    for order in ([0, 1], [1, 0], [1, 0], [0, 1]):
        if before is not None and order == [0, 1]:
            rows.forget()
        at = lengths[order]
        step = rows.plan(planner, at, at, torch.tensor([5, 5]), table[order], False)
        # By request, to be compared whatever their order.
        queries = torch.randn(LAYERS, ROWS, HEADS, DIM)
        key, value = torch.randn(2, ROWS, KV_HEADS, DIM)
        for layer, query in zip(layers, queries, strict=True):
            layer.run(query[order], key, value, step, torch.empty(ROWS, HEADS, DIM))
        assert len(vectors) == LAYERS
        if before is not None:
            assert torch.stack(vectors).equal(before[:, order])
        vectors.clear()
        lengths, before = lengths + 1, queries


def test_a_tap_takes_one_launch():
    """The recording is an operation of its own for PyTorch; what counts is what that does."""
    pytest.importorskip("vllm")
    from vllm_sparse.forecast import tap

    hidden, qkv = torch.randn(3, 16), torch.zeros(3, 1)
    for bias in (None, torch.ones(2 * KV_HEADS * DIM)):
        values, weight = torch.zeros(8, 2, KV_HEADS, DIM), torch.randn(2 * KV_HEADS * DIM, 16)
        with Operations() as operations:
            tap._record(hidden, weight, bias, qkv, values)
        assert operations.found == {"aten::mm" if bias is None else "aten::addmm": 1}
        expected = torch.nn.functional.linear(hidden, weight, bias).view(3, 2, KV_HEADS, DIM)
        torch.testing.assert_close(values[:3], expected)
