# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""One tap by itself: its projection, its rotation, and that a missing weight shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

KV_HEADS, DIM = 2, 32


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("long", [False, True])
def test_rotation_partial_and_long(partial, long, monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import (
        get_rope,
        phi3_long_rope_scaled_rope,
    )
    from vllm_sparse.kernels.reference.sparda_select import rotate

    from vllm_sparse.forecast.tap import ForecastTap

    rotary_dim = int(partial * DIM)
    factors = [1.0 + 0.3 * i for i in range(rotary_dim // 2)]
    parameters: dict[str, Any] = {
        "rope_type": "longrope" if long else "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial,
    }
    if long:
        parameters |= {
            "short_factor": [1.0] * (rotary_dim // 2),
            "long_factor": factors,
            "original_max_position_embeddings": 256,
        }
    served = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: served)
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(DIM, 1024, rope_parameters=parameters, dtype=torch.float32)
    values = torch.randn(7, 2, KV_HEADS, DIM)
    tap = ForecastTap(rotary, 16, values, False)
    positions = torch.tensor([0, 1, 5, 255, 256, 700, 1023])
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    scale = 1.0
    if long:
        frequencies = frequencies / torch.tensor(factors)
        scale = (1 + torch.tensor(4.0).log() / torch.tensor(256.0).log()).sqrt()
    angle = (positions[:, None] * frequencies)[:, None]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    for part in range(2):
        x = values[:, part]
        before = x.clone()
        first, second = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
        want = torch.cat(
            (first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]), -1
        )
        torch.testing.assert_close(tap.rotate(positions, x), want, atol=2e-4, rtol=2e-4)
        known = tap.rotary()
        assert known is not None
        torch.testing.assert_close(rotate(x, positions, known), want, atol=2e-4, rtol=2e-4)
        assert torch.equal(x, before)
    assert tap.rotate(positions[:0], values[:0, 0]).shape == (0, KV_HEADS, DIM)


def test_a_rotation_that_kernels_do_not_know_is_left_to_the_model():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
    from vllm_sparse.kernels.reference.sparda_select import rotate

    from vllm_sparse.forecast.tap import ForecastTap

    class Own(RotaryEmbedding):
        def forward_native(self, *args: Any) -> Any:
            return super().forward_native(*args)

    values, positions = torch.randn(3, 1, KV_HEADS, DIM), torch.tensor([0, 7, 31])
    for kind, halves in ((RotaryEmbedding, True), (RotaryEmbedding, False), (Own, True)):
        with set_current_vllm_config(VllmConfig()):
            rotary = kind(DIM, DIM, 64, 100.0, halves, torch.float32)
        tap = ForecastTap(rotary, 16, values, False)
        known = tap.rotary()
        if kind is Own:
            assert known is None
        else:
            turned = rotate(values[:, 0], positions, known)
            torch.testing.assert_close(turned, tap.rotate(positions, values[:, 0]))


def test_an_unfilled_tap_shows():
    from vllm_sparse.errors import IntegrityError
    from vllm_sparse.forecast.tap import ForecastTap
    from vllm_sparse.forecast.tapped import Taps

    tap = ForecastTap(None, 16, torch.zeros(8, 2, KV_HEADS, DIM), has_bias=True)
    weight, bias = torch.randn(KV_HEADS * DIM, 16), torch.randn(KV_HEADS * DIM)
    tap.fill(0, weight, bias)
    assert not tap.ready
    taps = Taps()
    taps._taps.append(tap)
    with pytest.raises(IntegrityError, match="--load-format auto"):
        taps.check()
    x = torch.randn(9, 16)  # one padded row more than there is room for
    tap(x, torch.zeros(9, 1))
    torch.testing.assert_close(tap.values[:, 0], (x @ weight.T + bias)[:8].view(8, KV_HEADS, DIM))
    assert tap.values[:, 1].isnan().all()
    tap.fill(-1, weight)
    assert tap.ready
    taps.check()


def test_a_tap_without_memory_of_its_own_is_not_filled():
    """vLLM builds a model on "meta" where another process has its weights."""
    from vllm_sparse.forecast.tap import ForecastTap

    with torch.device("meta"):
        tap = ForecastTap(None, 16, torch.zeros(8, 1, KV_HEADS, DIM), has_bias=False)
    tap.fill(0, torch.randn(KV_HEADS * DIM, 16))
    assert not tap.ready
