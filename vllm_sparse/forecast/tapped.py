# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Models with taps: their classes, made when vLLM asks for them, and the weights of the taps.

The classes are ``SpardaLlamaForCausalLM`` and so on.

Notation: H query heads, G KV heads of this rank, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index

from vllm_sparse.config import load_settings
from vllm_sparse.errors import IntegrityError, UnsupportedError
from vllm_sparse.forecast.reload import watch_reloads
from vllm_sparse.forecast.routing import ARCHITECTURES, LOOKAHEAD_SELECTORS, PREFIX
from vllm_sparse.forecast.tap import ForecastTap, tapped_projection
from vllm_sparse.forecast.weights import (
    check_metadata,
    load_forecast,
    lookahead_weights,
    other_model,
    other_prompts,
    scaled_by_norm,
    shard_heads,
)

if TYPE_CHECKING:
    from vllm_sparse.forecast.weights import ForecastWeights
    from vllm_sparse.policies.sparda import SpardaSettings

logger = init_logger("vllm.sparse.sparda")


def __getattr__(name: str) -> type[nn.Module]:
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _tapped_model(architecture)


@functools.cache
def _tapped_model(architecture: str) -> type[nn.Module]:
    # What the registry has under the name, which another plugin may have replaced.
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    class Tapped(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self.__dict__["forecast_taps"] = install_taps(self, vllm_config)

        def process_weights_after_loading(self) -> None:
            inherited = getattr(super(), "process_weights_after_loading", None)
            if inherited is not None:
                inherited()
            self.forecast_taps.check()

    Tapped.__name__ = Tapped.__qualname__ = PREFIX + architecture
    Tapped.__doc__ = f"{architecture} with taps."
    return Tapped


class Taps:
    """All taps of a model."""

    def __init__(self) -> None:
        self._taps: list[ForecastTap] = []
        self._pending: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._targets: list[tuple[ForecastTap, int]] = []
        self._norms: list[Any] = []

    @property
    def follow_queries(self) -> bool:
        """Whether they were made from the model's query projections."""
        return bool(self._targets)

    def check(self) -> None:
        """Called once all weights were loaded and processed.

        Raises:
            IntegrityError: Some tap has no weights.
        """
        if not all(tap.ready for tap in self._taps):
            raise IntegrityError(
                "the model was loaded, but not every qkv_proj was processed, so the look-ahead of "
                "some layers has no weights. This load format is not supported: use "
                "--load-format auto, or selector query or previous"
            )

    def capture(self, layer: int, linear: Any) -> None:
        """Take a layer's query projection before vLLM packs it."""
        weight, bias = _query_rows(linear)
        self._pending[layer] = lookahead_weights(
            weight, bias, linear.num_heads, linear.num_kv_heads, linear.head_size
        )

    def complete(self, layer: int) -> None:
        """Fill a tap with what was taken, when all other modules have their weights.

        Before, the norm may lack its own. And while vLLM loads new weights into a served model,
        no module has the memory that it computes with, the tap included.
        """
        if layer not in self._pending:
            return
        (weight, bias), norm = self._pending.pop(layer), self._norms[layer]
        if norm is not None:
            weight, bias = scaled_by_norm(weight, bias, norm.weight)
        tap, part = self._targets[layer]
        tap.fill(part, weight, bias)


@dataclass(frozen=True)
class _Layer:
    attention: Any  # the model's attention module
    index: int

    @property
    def linear(self) -> Any:
        return self.attention.qkv_proj

    @property
    def attn(self) -> Any:
        return self.attention.attn


def install_taps(model: nn.Module, vllm_config: Any) -> Taps:
    """Give every attention layer that must look ahead its tap, as ``Attention.sparda_tap``.

    Call it right after the model was built; call ``check`` of the result after its weights were
    loaded and processed. Layers without a tap have None, models with other selectors no attribute.

    Args:
        model: Built, not yet loaded.
        vllm_config: vLLM's configuration.

    Returns:
        The taps; none if the selector does not look ahead.

    Raises:
        ConfigError: The settings are wrong or the Forecast file is not this model's.
        UnsupportedError: The model's layers cannot be tapped; says which and why.
    """
    settings = load_settings(vllm_config.additional_config, "sparda")
    taps = Taps()
    if settings.chosen_selector not in LOOKAHEAD_SELECTORS:
        return taps
    layers = _attention_layers(model, vllm_config)
    _check_uniform(layers, _architecture(model))
    first, last = layers[0].linear, len(layers) - 1
    max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    dtype = vllm_config.model_config.dtype

    def recording(parts: int) -> Tensor:
        shape = (max_tokens, parts, first.num_kv_heads, first.head_size)
        return torch.zeros(shape, dtype=dtype)

    shared = [recording(1) if last > least else None for least in (2, 1)]  # layers 2, 4..; 1, 3..
    learned = settings.chosen_selector == "forecast"
    served = vllm_config.model_config.model
    weights = _load_learned(settings, first, last + 1, served) if learned else None
    if weights is not None:
        has_bias = weights.current_bias is not None
    else:
        has_bias = any(layer.linear.bias is not None for layer in layers)
    for layer in layers:
        values = recording(1 + (last > 0)) if layer.index == 0 else shared[layer.index % 2]
        if values is None or layer.index == last > 0:
            layer.attn.sparda_tap = None
            continue
        tap = ForecastTap(layer.attention.rotary_emb, layer.linear.input_size, values, has_bias)
        # A plain attribute, or the tap would be a submodule twice.
        layer.attn.__dict__["sparda_tap"] = tap
        projection: Any = type(layer.linear)
        layer.linear.__class__ = tapped_projection(projection)
        layer.linear.forecast_tap = tap
        taps._taps.append(tap)
    if weights is not None:
        _fill_learned(taps, weights, first)
    else:
        _fill_from_queries(taps, layers)
        watch_reloads(vllm_config.use_v2_model_runner)
    return taps


def _load_learned(
    settings: SpardaSettings, linear: Any, num_layers: int, served: str
) -> ForecastWeights:
    assert settings.forecast is not None
    weights = load_forecast(
        settings.forecast,
        num_layers,
        linear.total_num_kv_heads,
        linear.head_size,
        linear.input_size,
    )
    trained = weights.metadata.get("base_model", "an unnamed model")
    logger.info("Forecast %s, trained for %s", settings.forecast, trained)
    metadata = weights.metadata
    for warning in (
        check_metadata(metadata, settings),
        other_prompts(metadata, settings),
        other_model(metadata, served),
    ):
        if warning:
            logger.warning("%s: %s", settings.forecast, warning)
    if weights.unused:
        logger.info(
            "%s: not used, as only layer 0 looks for itself and the last layer for none: %s",
            settings.forecast,
            ", ".join(weights.unused),
        )
    return weights


def _fill_learned(taps: Taps, weights: ForecastWeights, linear: Any) -> None:
    def own(rows: Tensor | None) -> Any:
        if rows is None:
            return None
        return shard_heads(rows, linear.total_num_kv_heads, linear.tp_rank, linear.tp_size)

    taps._taps[0].fill(0, own(weights.current), own(weights.current_bias))
    for layer, weight in enumerate(weights.future):
        bias = weights.future_bias[layer] if weights.future_bias else None
        taps._taps[layer].fill(-1, own(weight), own(bias))


def _fill_from_queries(taps: Taps, layers: list[_Layer]) -> None:
    """Arrange that each layer's query projection is taken as soon as it is loaded."""
    taps._targets = [(taps._taps[0], 0), *((tap, -1) for tap in taps._taps)][: len(layers)]
    for layer in layers:
        taps._norms.append(_query_norm(layer))
        # Processing packs weights (always so on CPU), after which there is no matrix to read, and
        # is what all load formats have in common.
        method = layer.linear.quant_method
        method.process_weights_after_loading = functools.partial(
            _capture_and_process, taps, layer.index, method.process_weights_after_loading
        )
        # Attention is processed when all other modules have their weights.
        layer.attn.process_weights_after_loading = functools.partial(
            _complete_and_process, taps, layer.index, layer.attn.process_weights_after_loading
        )


def _capture_and_process(taps: Taps, index: int, process: Any, linear: Any) -> None:
    taps.capture(index, linear)
    process(linear)


def _complete_and_process(taps: Taps, index: int, process: Any, dtype: Any) -> None:
    taps.complete(index)
    process(dtype)


def _query_rows(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Rows of the query in a QKV projection: ``[H * D, hidden]`` and their bias."""
    rows = linear.num_heads * linear.head_size
    weight = getattr(linear, "weight", None)
    shape = (linear.output_size_per_partition, linear.input_size)
    if (
        weight is None
        or tuple(weight.shape) != shape
        or not weight.is_floating_point()
        or weight.element_size() < 2
    ):
        found = "no weight" if weight is None else f"a {weight.dtype} weight {list(weight.shape)}"
        raise UnsupportedError(
            f"selector lookahead-query averages the query projection, but {linear.prefix} has "
            f"{found} instead of a floating-point matrix {list(shape)}; it is quantised. Use a "
            "model that is not, a trained forecast, or selector query or previous"
        )
    bias = linear.bias
    return weight.detach()[:rows], None if bias is None else bias.detach()[:rows]


def _query_norm(layer: _Layer) -> Any:
    norm = getattr(layer.attention, "q_norm", None)
    head_size = layer.linear.head_size
    if norm is None or (type(norm) is RMSNorm and tuple(norm.weight.shape) == (head_size,)):
        return norm
    raise UnsupportedError(
        f"selector lookahead-query cannot reproduce the query norm {type(norm).__name__} of layer "
        f"{layer.index}; use a trained forecast, or selector query or previous"
    )


def _architecture(model: nn.Module) -> str:
    return next(c.__name__ for c in type(model).__mro__ if not c.__name__.startswith(PREFIX))


def _attention_layers(model: nn.Module, vllm_config: Any) -> list[_Layer]:
    """The model's attention modules in the order of its layers."""
    name = _architecture(model)
    context = vllm_config.compilation_config.static_forward_context.values()
    known = {id(layer): layer for layer in context if isinstance(layer, Attention)}
    layers = []
    for module in model.modules():
        attn: Any = module._modules.get("attn")
        if id(attn) not in known:
            continue
        del known[id(attn)]
        if "qkv_proj" not in module._modules or getattr(module, "rotary_emb", None) is None:
            lacking = "qkv_proj" if "qkv_proj" not in module._modules else "rotary_emb"
            raise _untappable(name, f"{attn.layer_name} stands beside no {lacking}")
        layers.append(_Layer(module, extract_layer_index(attn.layer_name)))
    if known or not layers:
        names = ", ".join(layer.layer_name for layer in known.values()) or "any attention layer"
        raise _untappable(name, f"no module holds {names} as attn")
    layers.sort(key=lambda layer: layer.index)
    if [layer.index for layer in layers] != list(range(len(layers))):
        raise _untappable(name, f"attention layers are {[layer.index for layer in layers]}")
    return layers


def _check_uniform(layers: list[_Layer], name: str) -> None:
    first = layers[0]
    for attribute in ("total_num_kv_heads", "num_heads", "head_size", "input_size", "tp_size"):
        if not hasattr(first.linear, attribute):
            raise _untappable(name, f"its qkv_proj is a {type(first.linear).__name__}")
        values = [getattr(layer.linear, attribute) for layer in layers]
        if len(set(values)) > 1:
            raise _untappable(name, f"{attribute} differs between layers: {values}")
    if any(layer.attention.rotary_emb is not first.attention.rotary_emb for layer in layers):
        raise _untappable(name, "its layers use different rotary embeddings")


def _untappable(architecture: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{architecture} cannot look a layer ahead: {reason}. Use selector query or previous"
    )
