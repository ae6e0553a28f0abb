# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A model as its ``config.json`` describes it, in the words of vLLM's configuration.

So refusals and sizes are the functions that start-up calls; nothing is said twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.backends.refusals import check_layer, check_windows
from vllm_sparse.device_room import largest, mlp_widths
from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.features import reason
from vllm_sparse.planner.reading import find_config, read_config
from vllm_sparse.planner.shapes import Shape
from vllm_sparse.quantized import ItemBytes, described, item_bytes
from vllm_sparse.registry import entries

if TYPE_CHECKING:
    from pathlib import Path

_ATTENTION_FREE = ("mamba", "mamba2", "falcon_mamba", "rwkv")
_RECURRENT_KEYS = ("mamba_d_state", "mamba_d_ssm", "linear_num_key_heads", "attn_layer_indices")
_LEAST_BYTES = 0.5
# Experts of a token, by the names that vLLM knows.
_ACTIVE = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k"),
)
_RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv")
_NO_MIXING = ("mlp", "moe")  # layers of Nemotron-H that are not a part of others
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
_UNSAID = 8192  # longest request of a model that does not say


@dataclass(frozen=True)
class Model:
    """What vLLM's ``ModelConfig`` says of a model, as far as we ask.

    Attributes:
        folder: With ``config.json``, and weights if there are any.
        config: Its content.
        max_model_len: Longest request, in tokens.
    """

    folder: Path
    config: dict[str, Any]
    max_model_len: int
    enable_sleep_mode: bool = False

    @cached_property
    def text(self) -> dict[str, Any]:
        """The part about the language model."""
        return {**self.config, **(self.config.get("text_config") or {})}

    @property
    def model(self) -> str:
        """The folder, where vLLM has it."""
        return str(self.folder)

    @property
    def hf_text_config(self) -> SimpleNamespace:
        """With attributes."""
        return SimpleNamespace(**self.text)

    @property
    def architecture(self) -> str:
        """The name of its class."""
        return str((self.config.get("architectures") or ["unknown"])[0])

    @property
    def dtype(self) -> torch.dtype:
        """That vLLM's ``--dtype auto`` chooses."""
        name = str(self.text.get("dtype") or self.text.get("torch_dtype") or "bfloat16")
        return torch.float16 if name == "float16" else torch.bfloat16

    @property
    def quantization(self) -> str | None:
        """How weights are stored; ``None``: as they are."""
        return described(self).get("quant_method")

    @property
    def use_mla(self) -> bool:
        """Whether tokens have one latent vector."""
        return bool(self.text.get("kv_lora_rank"))

    @property
    def is_attention_free(self) -> bool:
        """Whether nothing attends."""
        return self.text.get("model_type") in _ATTENTION_FREE

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers are recurrent; Granite's class has their sizes even without them."""
        if set(self._kinds) & set(_RECURRENT_LAYERS):
            return True
        attend = bool(self._kinds) and set(self._kinds) <= {"attention", "full_attention"}
        return not attend and any(key in self.text for key in _RECURRENT_KEYS)

    @property
    def runner_type(self) -> str:
        """Whether it generates."""
        generates = self.architecture.endswith(("CausalLM", "ConditionalGeneration"))
        return "generate" if generates or "LMHead" in self.architecture else "pooling"

    @property
    def other_layers(self) -> int:
        """Layers that keep a window, a state or nothing, not every token."""
        others = (*_RECURRENT_LAYERS, *_NO_MIXING)
        return self.windowed_layers + sum(kind in others for kind in self._kinds)

    @property
    def _kinds(self) -> list[str]:
        """What each layer is; empty where they are alike, or not told apart."""
        return list(self.text.get("layer_types") or self.text.get("layers_block_type") or ())

    @property
    def windowed_layers(self) -> int:
        """Layers with a sliding window."""
        if self.text.get("layer_types"):
            return self._kinds.count("sliding_attention")
        window = self.text.get("sliding_window")
        return self.layers if window and self.text.get("use_sliding_window", True) else 0

    @property
    def full_layers(self) -> int:
        """Layers that keep every token."""
        return self.layers - self.other_layers

    @property
    def window_of_all(self) -> int | None:
        """The window, if every layer that attends has one."""
        alike = self.windowed_layers and not self.full_layers
        return self.text.get("sliding_window") if alike else None

    @property
    def attention_chunk_size(self) -> int | None:
        """Tokens of the chunks that some layers attend within."""
        return self.text.get("attention_chunk_size")

    @property
    def layers(self) -> int:
        """All of them."""
        return int(self.text["num_hidden_layers"])

    def get_num_layers(self, parallel: Any) -> int:
        """Layers of a rank."""
        return self.layers // int(parallel.pipeline_parallel_size)

    def get_total_num_hidden_layers(self) -> int:
        """Layers of all ranks."""
        return self.layers

    def get_total_num_kv_heads(self) -> int:
        """KV heads of all ranks."""
        heads = self.text["num_attention_heads"]
        return int(self.text.get("num_key_value_heads") or heads)

    def get_num_kv_heads(self, parallel: Any) -> int:
        """KV heads of a rank."""
        return max(1, self.get_total_num_kv_heads() // int(parallel.tensor_parallel_size))

    def get_num_attention_heads(self, parallel: Any) -> int:
        """Query heads of a rank."""
        return int(self.text["num_attention_heads"]) // int(parallel.tensor_parallel_size)

    def get_head_size(self) -> int:
        """D."""
        return int(self.text.get("head_dim") or self.hidden // self.text["num_attention_heads"])

    @property
    def furthest(self) -> int:
        """Tokens that it was made for, scaled as vLLM does; 0: it does not say."""
        said = self.text.get("model_max_length") or self.text.get("max_position_embeddings") or 0
        # Gemma 3 gives a length that is scaled already.
        factor = 1.0 if "gemma3" in str(self.config.get("model_type")) else self._rope_factor
        return int(said * factor)

    @property
    def _rope_factor(self) -> float:
        found = self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}
        by_kind = [each for each in found.values() if isinstance(each, dict)]
        factor = 1.0
        for rope in by_kind or [found]:
            if (rope.get("rope_type") or rope.get("type")) not in _SCALED_ALREADY:
                factor = float(rope.get("factor") or factor)
        return factor

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.text["hidden_size"])

    def get_hidden_size(self) -> int:
        """Width of the residual stream, by the name of vLLM's model configuration."""
        return self.hidden

    def get_num_experts(self) -> int:
        """Experts of a layer; 0 for dense models."""
        for key in ("num_local_experts", "num_experts", "n_routed_experts"):
            if self.text.get(key):
                return int(self.text[key])
        return 0

    def shape(self) -> Shape:
        """What a decode step reads; numbers of unknown size count as the least that they may be."""
        experts = self.get_num_experts()
        width, shared = mlp_widths(self.hf_text_config)
        each = item_bytes(self) or ItemBytes(_LEAST_BYTES, _LEAST_BYTES)
        return Shape(
            self.architecture,
            self.layers,
            self.hidden,
            width,
            int(self.text["num_attention_heads"]),
            self.get_total_num_kv_heads(),
            self.get_head_size(),
            int(self.text["vocab_size"]),
            0.0,
            self.other_layers,
            experts=experts,
            active=max(largest(self.text.get(key)) or 1 for key in _ACTIVE) if experts else 0,
            shared=shared,
            attention_bytes=each.attention,
            mlp_bytes=each.mlp,
        )

    def layer_refusals(self, name: str, on_gpu: bool, flash_attention: int) -> list[str]:
        """Why layers cannot be served by a backend; what start-up finds when it builds them.

        Args:
            name: Of the backend.
            on_gpu: The path of GPUs.
            flash_attention: The version there.
        """
        text, found = self.text, []
        alibi = text.get("alibi") or text.get("model_type") in ("bloom", "mpt")
        sinks = text.get("model_type") == "gpt_oss"
        try:
            check_layer(
                name,
                on_gpu,
                alibi_slopes=alibi or None,
                sinks=sinks or None,
                logits_soft_cap=text.get("attn_logit_softcapping"),
                attn_type="encoder" if text.get("is_encoder_decoder") else "decoder",
                kv_sharing_target_layer_name=text.get("num_kv_shared_layers") or None,
                sliding_window=None,
                kv_cache_dtype="auto",
                expected_cache_dtype="auto",
            )
        except UnsupportedError as error:
            found.append(str(error))
        try:
            if self.windowed_layers:
                check_windows(name, on_gpu)
        except UnsupportedError as error:
            found.append(str(error))
        if sinks and on_gpu and flash_attention < 3:
            facts = {"version": flash_attention}
            found.append(reason("sinks-flash-attention", entries()[name].family, True, **facts))
        return list(filter(None, found))


def read_model(name: str) -> Model:
    """The model of a name, with the longest request that it was made for.

    Args:
        name: A ``config.json``, a folder that has one, a model that ``vllm-sparse fetch-model``
            has cached, or one of the Hugging Face cache. Nothing is downloaded.

    Raises:
        ConfigError: There is none, or it lacks what every decoder's has.
    """
    path = find_config(name)
    model = Model(path.parent, read_config(path), _UNSAID)
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not model.text.get(key)]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}, which every decoder-only model's config.json has"
        )
    return replace(model, max_model_len=model.furthest) if model.furthest else model
