# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which model class vLLM builds: the tapped one where a selector looks ahead, else its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.forecast.routing import (
    ARCHITECTURES,
    PREFIX,
    register_architectures,
    route_model,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def _config(architecture: str, selector: str) -> Any:
    return SimpleNamespace(
        additional_config={"vllm_sparse": {"selector": selector}},
        model_config=SimpleNamespace(
            architecture=architecture,
            hf_config=SimpleNamespace(architectures=[architecture]),
        ),
    )


def test_routing():
    config = _config("LlamaForCausalLM", "lookahead-query")
    for _ in range(2):
        route_model(config)
        assert config.model_config.hf_config.architectures == ["SpardaLlamaForCausalLM"]
    for selector in ("query", "previous"):
        for name in ("LlamaForCausalLM", "FalconForCausalLM"):
            config = _config(name, selector)
            route_model(config)
            assert config.model_config.hf_config.architectures == [name]
    with pytest.raises(
        UnsupportedError, match=r"FalconForCausalLM is not among.*query or previous"
    ):
        route_model(_config("FalconForCausalLM", "lookahead-query"))


def test_every_architecture_is_vllms_and_registered_lazily():
    from vllm.model_executor.models import ModelRegistry

    from vllm_sparse.forecast import tapped

    for _ in range(2):
        register_architectures()
    for name in ARCHITECTURES:
        entry = ModelRegistry.models[PREFIX + name]
        assert (entry.module_name, entry.class_name) == (tapped.__name__, PREFIX + name)
    stock = ModelRegistry.models["LlamaForCausalLM"].load_model_cls()
    ours = ModelRegistry.models["SpardaLlamaForCausalLM"].load_model_cls()
    assert ours is tapped.SpardaLlamaForCausalLM
    assert issubclass(ours, stock)
    assert ours.packed_modules_mapping is stock.packed_modules_mapping
    assert ours.hf_to_vllm_mapper is stock.hf_to_vllm_mapper
    with pytest.raises(AttributeError):
        _ = tapped.SpardaFalconForCausalLM
