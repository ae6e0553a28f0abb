# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How a model that must look ahead becomes its tapped class, with every other model untouched.

vLLM resolves the class of a model in the worker, from the names in ``hf_config.architectures``;
everything that it derives from the architecture otherwise was settled before, under the real name.
So putting our name there when SPARDA is chosen changes which class is built and nothing else.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.config import load_settings
from vllm_sparse.features import SPARDA, refuse

PREFIX = "Sparda"
LOOKAHEAD_SELECTORS = ("forecast", "lookahead-query")

ARCHITECTURES = (
    "ApertusForCausalLM",
    "Ernie4_5ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "IQuestCoderForCausalLM",
    "InternLM3ForCausalLM",
    "LLaMAForCausalLM",
    "LlamaForCausalLM",
    "MiMoForCausalLM",
    "MiniCPMForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SolarForCausalLM",
    "TeleChat2ForCausalLM",
    "TeleChat3ForCausalLM",
)
"""Those whose attention modules hold qkv_proj, rotary_emb and attn."""


def register_architectures() -> None:
    """Tell vLLM's registry where the tapped classes are; nothing is built or imported yet."""
    from vllm.model_executor.models import ModelRegistry

    for name in ARCHITECTURES:
        if name in ModelRegistry.models and PREFIX + name not in ModelRegistry.models:
            target = f"vllm_sparse.forecast.tapped:{PREFIX}{name}"
            ModelRegistry.register_model(PREFIX + name, target)


def route_model(vllm_config: Any) -> None:
    """Let workers build the tapped class if the chosen selector looks ahead.

    Args:
        vllm_config: vLLM's configuration, for the SPARDA backend.

    Raises:
        ConfigError: The settings are wrong or the Forecast file is not this model's.
        UnsupportedError: It is unknown how to tap this architecture.
    """
    name = tapped_architecture(vllm_config)
    if name:
        register_architectures()
        vllm_config.model_config.hf_config.architectures = [PREFIX + name]


def tapped_architecture(vllm_config: Any) -> str:
    """The architecture to tap if the chosen selector looks ahead, else nothing.

    Args:
        vllm_config: vLLM's configuration, for the SPARDA backend.

    Raises:
        ConfigError: The settings are wrong or the Forecast file is not this model's.
        UnsupportedError: It is unknown how to tap this architecture.
    """
    settings = load_settings(vllm_config.additional_config, "sparda")
    if settings.chosen_selector not in LOOKAHEAD_SELECTORS:
        return ""
    model = vllm_config.model_config
    name: str = model.architecture.removeprefix(PREFIX)
    if name not in ARCHITECTURES:
        asked = {"selector": settings.chosen_selector, "architecture": name}
        refuse("unknown-projections", SPARDA, False, known=", ".join(ARCHITECTURES), **asked)
    if settings.forecast:
        # Here as well as in the workers: a wrong file should not cost a model load.
        from vllm_sparse.forecast.weights import check_metadata, load_forecast

        weights = load_forecast(
            settings.forecast,
            model.get_total_num_hidden_layers(),
            model.get_total_num_kv_heads(),
            model.get_head_size(),
            model.get_hidden_size(),
        )
        check_metadata(weights.metadata, settings)
    return name
