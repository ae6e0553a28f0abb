# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Names of a Forecast's tensors, and numbers of its metadata."""

from __future__ import annotations

import pytest

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast import file


@pytest.mark.parametrize("suffix", ["", file.BIAS])
@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_names_are_understood_under_any_prefix(prefix, suffix):
    for layer, kind in file.expected_tensors(12, suffix):
        name = file.canonical_name(layer, kind).removeprefix("model.")
        assert file.tensor_id(prefix + name) == (layer, kind)


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.self_attn.q_proj.weight", "model.layers.x.self_attn.q_future_proj.weight",
     "model.mylayers.3.self_attn.q_future_proj.weight", "layers.3.self_attn.q_future_proj.scale"],
)  # fmt: skip
def test_other_names_mean_nothing(name):
    assert file.tensor_id(name) is None


def test_each_layer_is_served_by_the_one_before_and_the_first_by_itself():
    assert file.expected_tensors(3) == [(0, file.CURRENT), (0, file.FUTURE), (1, file.FUTURE)]


@pytest.mark.parametrize("value", ["many", None, "1.5"])
def test_a_number_that_is_none_is_named(value):
    assert file.whole_number({"top_k": "16"}, "top_k") == 16
    with pytest.raises(ConfigError, match="top_k should be a whole number"):
        file.whole_number({"top_k": value}, "top_k")
