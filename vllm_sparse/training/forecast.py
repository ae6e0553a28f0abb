# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What is trained: one small projection per layer that points at what the next layer reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.forecast.weights import lookahead_weights, scaled_by_norm
from vllm_sparse.training.backbone import rotate

if TYPE_CHECKING:
    from vllm_sparse.training.backbone import Backbone
    from vllm_sparse.training.settings import Init


class Forecast(nn.Module):
    """The Forecast of a model with L layers.

    Projection 0 (``q_curr_proj``) serves layer 0 and sees layer 0's input; projection l
    (``q_future_proj`` of layer l - 1) serves layer l and sees layer l - 1's input.

    Attributes:
        projections: L linear maps, ``[G * D, hidden]`` each, in the order of the layers served.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, kv_heads: int, head_dim: int, bias: bool = False
    ) -> None:
        """Makes uninitialised projections.

        Args:
            num_layers: L.
            hidden_size: Width of a layer's input.
            kv_heads: G.
            head_dim: D.
            bias: Give the projections a bias, which SparDA's do not have. It helps models whose
                queries have one (Qwen2): a constant cannot be had from a normed input.
        """
        super().__init__()
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.projections = nn.ModuleList(
            nn.Linear(hidden_size, kv_heads * head_dim, bias=bias, dtype=torch.float32)
            for _ in range(num_layers)
        )

    @property
    def has_bias(self) -> bool:
        """Whether the projections have a bias."""
        return self._projection(0).bias is not None

    def forward(self, layer: int, inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The Forecast that serves one layer.

        Args:
            layer: The layer served.
            inputs: What :func:`input_layer` of it sees, ``[T, hidden]``.
            cos: RoPE table of cosines at the rows' own positions, ``[T, rotated]``.
            sin: Its sines, ``[T, rotated]``.

        Returns:
            ``[G, T, D]``.
        """
        projection = self._projection(layer)
        vectors = projection(inputs.to(projection.weight.dtype))
        vectors = vectors.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(0, 1)
        return rotate(vectors, cos, sin)

    def _projection(self, layer: int) -> nn.Linear:
        projection = self.projections[layer]
        assert isinstance(projection, nn.Linear)
        return projection

    @torch.no_grad()
    def initialise(
        self, init: Init, backbone: Backbone, seed: int, text: Tensor | None = None
    ) -> None:
        """Sets the first weights.

        Args:
            init: ``lookahead``: the mean, over the query heads of a KV head, of the query
                projection of the layer served, which scores like that layer's query if the hidden
                state hardly changes from layer to layer. A norm of queries counts with its weight.
                ``uniform``: SparDA's, between plus and minus one over the root of the width.
            backbone: The frozen model.
            seed: For ``uniform``.
            text: Token ids, ``[n]``, for ``lookahead`` without a bias on a model whose queries
                have one: it is folded into the weights along the direction in which the layer's
                inputs are nearly constant on this text.

        Raises:
            UnsupportedError: The model has no query projections to start from.
        """
        generator = torch.Generator().manual_seed(seed)
        constants: list[Tensor] = []
        if init == "lookahead" and text is not None and not self.has_bias:
            backbone.run(text, lambda view: constants.append(constant_direction(view.inputs)))
        for layer in range(len(self.projections)):
            target = self._projection(layer)
            if init == "uniform":
                bound = target.in_features**-0.5
                values = torch.empty(target.weight.shape)
                target.weight.copy_(values.uniform_(-bound, bound, generator=generator))
                if target.bias is not None:
                    target.bias.zero_()
                continue
            query = backbone.projection(layer, "q_proj")
            if query is None:
                raise UnsupportedError(
                    f"{backbone.name}: layer {layer} has no q_proj to start from; use "
                    "--init uniform"
                )
            norm = backbone.query_norm(layer)
            weight, bias = lookahead_weights(
                query.weight.float(),
                None if query.bias is None else query.bias.float(),
                backbone.num_heads,
                self.kv_heads,
                self.head_dim,
            )
            if norm is not None:
                weight, bias = scaled_by_norm(weight, bias, norm)
            target.weight.copy_(weight)
            if target.bias is not None:
                target.bias.zero_() if bias is None else target.bias.copy_(bias)
            elif bias is not None and constants:
                target.weight.add_(torch.outer(bias, constants[input_layer(layer)]).cpu())


def constant_direction(inputs: Tensor, ridge: float = 1e-3) -> Tensor:
    """The vector whose product with every input is as near to one as possible.

    The inputs of an attention layer have a large component in common, so this comes within a few
    percent. With it, weights alone can do what a bias does.

    Args:
        inputs: ``[n, hidden]``.
        ridge: Damping, relative to the mean square of the inputs.

    Returns:
        float32 ``[hidden]``.
    """
    inputs = inputs.float()
    square = inputs.T @ inputs / len(inputs)
    square.diagonal().add_(ridge * square.diagonal().mean())
    return torch.linalg.solve(square, inputs.mean(0))


def input_layer(layer: int) -> int:
    """The layer whose input the Forecast for ``layer`` sees."""
    return max(0, layer - 1)
