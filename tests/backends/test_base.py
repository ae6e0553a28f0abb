# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What both backends take from a layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_sparse.errors import IntegrityError

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_scales_in_use_stay():
    """A builder is made twice; new weights may bring the same scales, and no others."""
    from vllm_sparse.backends.base import final_scales

    processed = []
    impl = SimpleNamespace(process_weights_after_loading=processed.append)
    layer = SimpleNamespace(impl=impl, layer_name="layer.0", _k_scale_float=0.5, _v_scale_float=2.0)
    for _ in range(2):
        scales = final_scales(layer, False)
    assert (scales.key, scales.value, scales.truncates) == (0.5, 2.0, False)
    impl.process_weights_after_loading(torch.bfloat16)
    assert processed == [torch.bfloat16]
    layer._v_scale_float = 0.37
    with pytest.raises(IntegrityError, match=r"layer\.0.*\(0\.5, 0\.37\).*runs with \(0\.5, 2\.0"):
        impl.process_weights_after_loading(torch.bfloat16)
