# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention to chosen tokens."""

from __future__ import annotations

import pytest
import torch
from reference import rocketkv_bruteforce as brute
from support.policies import tensors

from vllm_sparse.policies.attention import attend


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attend_equals_brute_force(scale):
    query, keys, values = tensors(4, (6, 16), (2, 30, 16), (2, 30, 16))
    index = torch.tensor([[0, 3, 29], [5, 6, 7]])
    ours = attend(query, keys, values, index, scale)
    torch.testing.assert_close(ours, brute.attend(query, keys, values, index, scale))


def test_attend_to_everything_is_dense_attention():
    query, keys, values = tensors(5, (6, 16), (2, 30, 16), (2, 30, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[None, :, None], keys[None], values[None], enable_gqa=True
    )
    everything = torch.arange(30).expand(2, -1)
    torch.testing.assert_close(attend(query, keys, values, everything), dense[0, :, 0])
