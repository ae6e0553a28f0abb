# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The sizes of a model that decide what a decode step reads."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Shape:
    """A decoder-only model with grouped query attention and a gated MLP, `intermediate` wide.

    Of its layers, `other_layers` keep a window or a state, not every token.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    other_layers: int = 0

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate
        return ITEM_BYTES * (self.layers * layer + self.hidden * self.vocab)

    @property
    def kv_layers(self) -> int:
        """Layers that keep every token."""
        return self.layers - self.other_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers that keep it."""
        return ITEM_BYTES * self.kv_layers * self.kv_heads * 2 * self.head_dim
