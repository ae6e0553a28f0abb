# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What is expected of a GPU, against what was estimated by hand before there was a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import torch

from benchmarks import cost, predictions
from benchmarks.gpu.shapes import LLAMA, MINICPM
from benchmarks.ops import rocketkv
from vllm_sparse.planner import bounds

H200 = predictions.Expected(cost.Machine(bytes_per_s=4.2e12), overlapped=True)
LONGEST = cost.Case._field_defaults["longest"]
K = 1024


def split_of(context: int) -> bounds.Split:
    return cost.split_of(cost.Case(context, 1024, 1))


@pytest.mark.parametrize(("context", "dense_us"), [(32 * K, 45), (128 * K, 155)])
def test_steps_take_what_was_estimated_for_them(context, dense_us):
    assert predictions.rest_ms(LLAMA, 1, H200) == pytest.approx(4.2, rel=0.05)
    found = predictions.dense_layer_us(LLAMA, 1, context, H200)
    assert found == pytest.approx(dense_us, rel=0.15)
    dense = predictions.step_ms(LLAMA, 1, context, None, LONGEST, H200)
    assert dense == pytest.approx(predictions.rest_ms(LLAMA, 1, H200) + 32e-3 * found)


def test_a_step_of_ours_has_the_layers_of_the_cost_model():
    split = split_of(32 * K)
    ours = predictions.step_ms(LLAMA, 1, 32 * K, split, LONGEST, H200)
    launched = cost.layer(cost.Case(32 * K, 1024, 1), H200.machine)
    layer = sum(cost.microseconds(kernel, *H200) for kernel in launched)
    assert ours == pytest.approx(predictions.rest_ms(LLAMA, 1, H200) + 32e-3 * layer)
    # Eviction alone reads all that it holds; selection alone scores all that there is.
    evicted = predictions.step_ms(LLAMA, 64, 32 * K, split._replace(stage2=False), LONGEST, H200)
    selected = predictions.step_ms(
        LLAMA, 64, 32 * K, split._replace(held=32 * K, page_size=1), LONGEST, H200
    )
    assert evicted > predictions.step_ms(LLAMA, 64, 32 * K, split, LONGEST, H200) < selected


def test_copies_are_hidden_or_waited_for():
    bound = bounds.PagedStep(compute_ms=5.0, transfer_ms=4.0)
    ahead, blocking = (
        predictions.paged_step_ms(MINICPM, bound, 19, H200, prefetch=prefetch)
        for prefetch in (True, False)
    )
    assert blocking == pytest.approx(ahead + 4.0)
    slow = bound._replace(transfer_ms=50.0)
    assert predictions.paged_step_ms(MINICPM, slow, 19, H200, prefetch=True) == 50.0


def test_every_operation_of_a_step_is_expected_to_take_something():
    case = cost.Case(32 * K, 1024, 1)
    found = {
        op.name: predictions.kernel_us(op.name, 1 << 20, H200, case, LLAMA)
        for op in (*rocketkv.STEP, *rocketkv.PROMPT, rocketkv.WHOLE_PROMPT)
    }
    assert None not in found.values(), found
    parts = found["append"] + found["select slots"] + found["attend slots"]
    assert found["whole step"] == pytest.approx(parts)
    assert found["attend all kept"] > found["attend slots"]
    assert predictions.kernel_us("unheard of", 1, H200, case, LLAMA) is None
    assert predictions.kernel_us("unheard of", 1, H200, None, MINICPM) is None


def test_a_gpu_is_what_it_says_of_itself(monkeypatch):
    told = SimpleNamespace(name="GPU", multi_processor_count=108, major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    found = predictions.expected_of(torch.device("cuda"), 1.5e12)
    assert not found.overlapped
    assert found.machine[:4] == ("GPU", 108, cost.Machine().clock_ghz, 1.5e12)
    told.clock_rate = 1_980_000
    assert predictions.expected_of(torch.device("cuda"), 1.5e12).machine.clock_ghz == 1.98
    assert predictions.facts(found)["predicted_for"]["multiprocessors"] == 108
