# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The sizes of a model that decide what a decode step reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Shape:
    """A decoder-only model with grouped query attention and a gated MLP, `intermediate` wide.

    Attributes:
        intermediate: Width of an MLP; of mixtures, of one expert.
        other_layers: Of its layers, those that keep a window or a state, not every token.
        experts: Of a layer; 0: there is one MLP.
        active: Experts of one token.
        shared: Width of the experts that all tokens share.
        attention_bytes: Of a number in attention's matrices.
        mlp_bytes: Of a number in those of the MLP.
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
    experts: int = 0
    active: int = 0
    shared: int = 0
    attention_bytes: float = ITEM_BYTES
    mlp_bytes: float = ITEM_BYTES

    def of_rank(self, ranks: int) -> Shape:
        """What one tensor-parallel rank has; more ranks than KV heads have copies of them."""
        return replace(
            self,
            intermediate=self.intermediate // ranks,
            heads=self.heads // ranks,
            kv_heads=max(1, self.kv_heads // ranks),
            vocab=self.vocab // ranks,
            shared=self.shared // ranks,
        )

    def experts_read(self, rows: int) -> float:
        """How many experts of a layer the tokens of so many requests choose, if evenly."""
        if not self.experts:
            return 1
        return self.experts * (1 - (1 - self.active / self.experts) ** rows)

    def step_weight_bytes(self, rows: int) -> float:
        """Bytes of weights that a decode step reads: all but the embedding.

        Args:
            rows: Requests, of which each chooses experts of its own.
        """
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        mlp = 3 * self.hidden * (self.intermediate * self.experts_read(rows) + self.shared)
        layer = attention * self.attention_bytes + mlp * self.mlp_bytes
        return self.layers * layer + ITEM_BYTES * self.hidden * self.vocab

    @property
    def kv_layers(self) -> int:
        """Layers that keep every token."""
        return self.layers - self.other_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers that keep it."""
        return ITEM_BYTES * self.kv_layers * self.kv_heads * 2 * self.head_dim
