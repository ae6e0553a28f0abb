# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The frozen model: one forward pass that hands out what each attention layer sees.

Queries, keys and values are taken where ``transformers`` passes them to its attention function, so
that every model built on it works, whatever it does before (biases, norms, fused projections).
MiniCPM is loaded as the Llama that it equals once its three scales are folded into the weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_sparse.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

_INTERFACE = "vllm_sparse_tap"


@dataclass(frozen=True)
class LayerView:
    """What one attention layer sees of a sequence of n tokens.

    Attributes:
        layer: Its number.
        inputs: What its projections are applied to, ``[n, hidden]``.
        query: After RoPE, ``[H, n, D]``.
        keys: After RoPE, ``[G, n, D]``.
        cos: RoPE table of cosines, ``[n, rotated]``; ``rotated`` is D unless RoPE is partial.
        sin: Its sines, ``[n, rotated]``.
        scale: What the layer multiplies its logits by, which is not ``1 / sqrt(D)`` in all models
            (Granite).
    """

    layer: int
    inputs: Tensor
    query: Tensor
    keys: Tensor
    cos: Tensor
    sin: Tensor
    scale: float


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE in the rotate-half layout.

    Args:
        vectors: ``[heads, T, D]``.
        cos: ``[T, rotated]`` with ``rotated`` at most D; later components are left alone.
        sin: ``[T, rotated]``.
    """
    rotated = cos.shape[-1]
    turned, kept = vectors[..., :rotated], vectors[..., rotated:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, kept), -1)


class Backbone:
    """A frozen decoder.

    Attributes:
        model: The decoder without its head.
        name: What to call it in files: its hub name, or the name of its directory.
        num_layers: Attention layers.
        hidden_size: Width of what they see.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Size of a head.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """Checks the structure of ``model`` and taps its attention layers.

        Raises:
            UnsupportedError: Not a decoder with grouped-query attention and rotate-half RoPE.
        """
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._attention = _attention_modules(model, name)
        config: Any = model.config
        self.num_layers = len(self._attention)
        self.hidden_size = int(config.hidden_size)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.num_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.hidden_size // self.num_heads)
        self._check(config)
        self._visit: Callable[[LayerView], None] | None = None
        self._route: Callable[[LayerView, Tensor], Tensor] | None = None
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._visited = 0
        _register_interface()
        model.set_attn_implementation(_INTERFACE)  # type: ignore[operator]
        for layer, module in enumerate(self._attention):
            module.register_forward_pre_hook(self._remember, with_kwargs=True)
            module.vllm_sparse_tap = (self, layer)  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """A short hash that tells models apart: shapes, dtype, a few weights, RoPE and factors."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            few = parameter.detach().flatten()[:16].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(few.numpy().tobytes())
        model: Any = self.model
        for name, value in sorted(model.config.to_dict().items()):
            if name.startswith("rope_") or name.endswith(("_multiplier", "_eps")):
                digest.update(f"{name} {value!r}".encode())
        return digest.hexdigest()[:16]

    @classmethod
    def load(
        cls, source: str, dtype: str = "bfloat16", device: torch.device | str = "cpu"
    ) -> Backbone:
        """Loads a Hugging Face directory or hub model.

        Args:
            source: Directory or hub name.
            dtype: Name of a torch dtype.
            device: Where to put it.

        Raises:
            ConfigError: It cannot be read.
            UnsupportedError: Its structure is unknown.
        """
        from transformers import AutoModel

        kind = getattr(torch, dtype)
        values = config_values(source)
        try:
            if values.get("model_type") == "minicpm":
                model = _load_minicpm(source, values, kind)
            else:
                model = AutoModel.from_pretrained(source, dtype=kind)
        except (OSError, ValueError) as error:
            raise _unreadable(source, error) from error
        name = Path(source).resolve().name if Path(source).is_dir() else source
        return cls(model.to(device), name)

    def check_sequences(self, sequences: Tensor) -> None:
        """Refuse what the model has never learnt to read.

        Args:
            sequences: Token ids, ``[count, tokens]``.

        Raises:
            ConfigError: They are longer than its positions, or have ids that it does not know.
        """
        model: Any = self.model
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and sequences.shape[1] > longest:
            raise ConfigError(
                f"seq_len: {sequences.shape[1]} tokens are more than the {longest} positions of "
                f"{self.name}. Lower --seq-len, or give a copy of its directory whose config.json "
                "stretches RoPE as you will serve it"
            )
        known = model.get_input_embeddings().num_embeddings
        if int(sequences.min()) < 0 or int(sequences.max()) >= known:
            raise ConfigError(
                f"data: token ids from {int(sequences.min())} to {int(sequences.max())}, but "
                f"{self.name} knows 0 to {known - 1}: they are another tokenizer's"
            )

    def projection(self, layer: int, name: str) -> nn.Linear | None:
        """A projection of a layer's attention (``q_proj``), or None if the model has none."""
        found = getattr(self._attention[layer], name, None)
        return found if isinstance(found, nn.Linear) else None

    def project_query(self, layer: int, inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The queries of a layer for any inputs, ``[n, hidden]`` to post-RoPE ``[H, n, D]``.

        Raises:
            UnsupportedError: The layer has no query projection of its own.
        """
        projection = self.projection(layer, "q_proj")
        if projection is None:
            raise UnsupportedError(
                f"{self.name}: layer {layer} has no q_proj, which lookahead needs. Use "
                "--init uniform"
            )
        query = projection(inputs).unflatten(-1, (-1, self.head_dim))
        norm = getattr(self._attention[layer], "q_norm", None)
        query = norm(query) if norm is not None else query
        return rotate(query.transpose(0, 1), cos, sin)

    def query_norm(self, layer: int) -> Tensor | None:
        """The weight of the layer's norm of queries, ``[D]``, or None if it has none."""
        norm = getattr(self._attention[layer], "q_norm", None)
        weight = getattr(norm, "weight", None)
        return weight if weight is not None and weight.numel() == self.head_dim else None

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        visit: Callable[[LayerView], None],
        route: Callable[[LayerView, Tensor], Tensor] | None = None,
    ) -> None:
        """Runs the model on one sequence and calls ``visit`` for each layer, in order.

        Args:
            tokens: Token ids, ``[n]``.
            visit: Called before the layer attends; without gradients unless it enables them.
            route: The layer's attention: from the view and the values ``[G, n, D]`` to the output
                ``[H, n, D]``. Dense if omitted.

        Raises:
            UnsupportedError: The model does not pass through transformers' attention interface.
        """
        self._visit, self._route, self._visited = visit, route, 0
        try:
            self.model(input_ids=tokens.to(self.device).unsqueeze(0), use_cache=False)
        finally:
            self._visit = self._route = self._seen = None
        if self._visited != self.num_layers:
            raise UnsupportedError(
                f"{self.name}: {self._visited} of {self.num_layers} layers used transformers' "
                "attention interface. Models with code of their own (trust_remote_code) are not "
                "supported; use the model's implementation in transformers"
            )

    def check_rope(self, tokens: int = 8) -> None:
        """Checks, on a few tokens, that the queries can be reproduced from the layer's inputs.

        Raises:
            UnsupportedError: RoPE has another layout, so that a Forecast would be rotated wrongly.
        """
        if self.projection(0, "q_proj") is None:
            return
        views: list[LayerView] = []
        self.run(torch.arange(tokens), views.append)
        view = views[-1]
        again = self.project_query(view.layer, view.inputs, view.cos, view.sin)
        error = (again.float() - view.query.float()).abs().max()
        if error > 0.02 * view.query.float().abs().max():
            raise UnsupportedError(
                f"{self.name}: its queries are not rotate-half RoPE of q_proj; a Forecast for "
                "this architecture would need its RoPE in vllm_sparse.training.backbone.rotate"
            )

    def _check(self, config: Any) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedError(
                f"{self.name}: {self.num_heads} query heads do not divide into "
                f"{self.num_kv_heads} KV heads; a Forecast has one head per KV head"
            )
        for layer in range(self.num_layers):
            keys = self.projection(layer, "k_proj")
            expected = self.num_kv_heads * self.head_dim
            if keys is not None and keys.out_features != expected:
                raise UnsupportedError(
                    f"{self.name}: layer {layer}'s k_proj gives {keys.out_features} values, but "
                    f"{self.num_kv_heads} KV heads of size {self.head_dim} make {expected}. Only "
                    "grouped-query attention with equal heads in all layers is supported"
                )
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedError(
                f"{self.name}: has layers of the kinds {', '.join(sorted(kinds))}; only full "
                "attention in every layer is supported"
            )

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._visit is None:
            return
        inputs = args[0] if args else kwargs["hidden_states"]
        tables = kwargs.get("position_embeddings")
        if tables is None:
            raise UnsupportedError(
                f"{self.name}: its attention gets no RoPE tables from the model, which means that "
                "it uses none or computes them itself. A Forecast needs them"
            )
        self._seen = (inputs[0], *(table[0] for table in tables))

    def _attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor | None:
        """Called in place of the attention; None if it should be dense."""
        if self._visit is None or self._seen is None:
            return None
        inputs, cos, sin = self._seen
        view = LayerView(layer, inputs, query[0], keys[0], cos, sin, scale)
        self._visited += 1
        self._visit(view)
        return self._route(view, values[0]).unsqueeze(0) if self._route else None


def config_values(source: str) -> dict[str, Any]:
    """What a model's ``config.json`` says.

    Args:
        source: Directory or hub name.

    Raises:
        ConfigError: It cannot be read.
    """
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    return dict(values)


def _unreadable(source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot load the model {source!r}: {error}. Give the directory of a Hugging Face "
        "model (with config.json and safetensors) or a hub name"
    )


def _attention_modules(model: nn.Module, name: str) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    found = [getattr(layer, "self_attn", None) for layer in layers or []]
    if not found or any(module is None for module in found):
        raise UnsupportedError(
            f"{name}: no decoder with layers[i].self_attn (found {type(model).__name__}). "
            "Llama, Mistral, Qwen2, Qwen3, MiniCPM and models built like them are supported"
        )
    return [module for module in found if module is not None]


def _register_interface() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_INTERFACE, _tapped_attention)
    # Every sequence is packed, so causality is all the mask that there is.
    AttentionMaskInterface.register(_INTERFACE, lambda *args, **kwargs: None)


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention function for transformers, ``[1, heads, n, D]`` to ``[1, n, H, D]``."""
    backbone, layer = module.vllm_sparse_tap
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    window = options.get("sliding_window")
    unlike = {"s_aux": options.get("s_aux"), "softcap": options.get("softcap")}
    if window is not None and window < key.shape[2]:
        unlike["sliding_window"] = window
    if given := [name for name, value in unlike.items() if value is not None]:
        raise UnsupportedError(
            f"{backbone.name}: layer {layer} attends with {', '.join(given)}, in sequences of "
            f"{key.shape[2]} tokens; only full softmax attention is supported. If it is a window, "
            "set sliding_window to null in config.json, as the model is served without it"
        )
    output = backbone._attend(layer, query, key, value, scale)
    if output is None:
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=query.shape[2] > 1,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.transpose(1, 2).contiguous(), None


def _load_minicpm(source: str, values: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """MiniCPM (its own model type) as a Llama: its scales are folded into the weights."""
    from transformers import LlamaConfig, LlamaModel

    scale_embedding = float(values.get("scale_emb", 1))
    residual = float(values.get("scale_depth", 1)) / values["num_hidden_layers"] ** 0.5
    kept = {
        key: value
        for key, value in values.items()
        if key not in ("model_type", "architectures", "auto_map", "sparse_config")
    }
    model: Any = LlamaModel.from_pretrained(source, config=LlamaConfig(**kept), dtype=dtype)
    with torch.no_grad():
        for weight, scale in (
            (model.embed_tokens.weight, scale_embedding),
            *((layer.self_attn.o_proj.weight, residual) for layer in model.layers),
            *((layer.mlp.down_proj.weight, residual) for layer in model.layers),
        ):
            weight.copy_(weight.float() * scale)
    return model
