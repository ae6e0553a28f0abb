# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Dense prompts: keys, values and queries of every layer, computed once per question.

Policies are pure functions of them, so one prompt serves every arm. The model runs in transformers;
what it leaves is kept in a scratch folder, because prompts are what costs time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_sparse.training.files import import_forecast

if TYPE_CHECKING:
    from pathlib import Path

LAST = 256  # queries at the prompt's end that are kept


@dataclass
class Prompt:
    """A processed prompt, after RoPE, in the model's dtype.

    Attributes:
        keys: ``[L, G, n, D]``.
        values: ``[L, G, n, D]``.
        last: Queries of the last tokens, ``[L, H, min(n, LAST), D]``.
        logits: Of the first generated token, ``[vocabulary]``.
    """

    keys: Tensor
    values: Tensor
    last: Tensor
    logits: Tensor


class Sizes(NamedTuple):
    """What a file of a Forecast is held against."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int


class Heads(NamedTuple):
    """What is alike in all layers.

    Attributes:
        query: Query heads.
        groups: KV heads.
        size: Of a head.
        scale: What logits are multiplied by, which is not ``1 / sqrt(size)`` in all models.
    """

    query: int
    groups: int
    size: int
    scale: float


class Network:
    """A model whose prompts run in transformers, and whose decode steps are laid open.

    Rows of a decode step are arms of one question: the weights are read once for all of them.
    Serves models of Llama's shape, with or without norms of queries and keys.

    Attributes:
        config: The model's.
        layers: Its decoder layers.
        eos: Tokens that end a reply.
        forecast: What says in a layer which blocks the next one reads, if a file was given.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.bfloat16,
        forecast: Path | None = None,
        prompt_dtype: torch.dtype | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: Of its files.
            dtype: Of its weights.
            forecast: File of one.
            prompt_dtype: What prompts are computed in, ``dtype`` if omitted.
        """
        AttentionInterface.register("capture", self._capture)
        AttentionMaskInterface.register("capture", sdpa_mask)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.set_attn_implementation("capture")
        self._model, self.config, self.layers = model, model.config, model.model.layers
        self._dtype, self._prompt_dtype = dtype, prompt_dtype or dtype
        ends = model.generation_config.eos_token_id
        self.eos = set(ends if isinstance(ends, list) else [ends]) - {None}
        self._queries: list[Tensor] = []
        self._tokens: list[int] = []
        self._before: Prompt
        heads = self.heads
        sizes = Sizes(len(self.layers), self.config.hidden_size, heads.groups, heads.size)
        self.forecast = import_forecast(forecast, sizes)[0] if forecast else None

    @property
    def heads(self) -> Heads:
        """Of its layers."""
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        (scale,) = {layer.self_attn.scaling for layer in self.layers}
        return Heads(config.num_attention_heads, config.num_key_value_heads, size, scale)

    def _capture(self, module: Any, query: Tensor, *arguments: Any, **options: Any) -> Any:
        self._queries.append(query[0, :, -LAST:].clone())
        return sdpa_attention_forward(module, query, *arguments, **options)

    @torch.inference_mode()
    def prompt(self, tokens: list[int]) -> Prompt:
        """Processes a prompt densely, but what it begins with as the one before did."""
        self._queries.clear()
        known = self._known(tokens)
        cache = DynamicCache(config=self.config)
        if known:
            keys, values = self._before.keys, self._before.values
            for number in range(len(self.layers)):
                parts = (part[number, None, :, :known] for part in (keys, values))
                cache.update(*parts, number)
        rest = torch.tensor([tokens[known:]])
        self._cast(self._prompt_dtype)
        output = self._model(rest, past_key_values=cache, logits_to_keep=1)
        self._cast(self._dtype)
        keys = torch.stack([layer.keys[0] for layer in cache.layers])
        values = torch.stack([layer.values[0] for layer in cache.layers])
        last = torch.stack(self._queries)
        self._queries.clear()
        self._tokens = tokens
        self._before = Prompt(keys, values, last, output.logits[0, -1])
        return self._before

    def _cast(self, dtype: torch.dtype) -> None:
        # Parameters only: the buffer of rotary frequencies stays as it is.
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)

    def _known(self, tokens: list[int]) -> int:
        """Tokens to take from the prompt before: not the last ones, whose queries are wanted."""
        pairs = zip(tokens[:-LAST], self._tokens, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int, attend: Any) -> Tensor:
        """One decode step of all arms.

        Args:
            tokens: One per arm, ``[A]``.
            position: Of these tokens.
            attend: ``(layer, query [A, H, D], key [A, G, D], value [A, G, D], forecast [A, G, D]
                or None) -> [A, H, D]``.

        Returns:
            Logits, ``[A, vocabulary]``.
        """
        inner = self._model.model
        hidden = inner.embed_tokens(tokens)
        cos, sin = inner.rotary_emb(hidden, torch.tensor([[position]]))
        cos, sin = cos[0], sin[0]  # [1, D]
        size = self.heads.size
        before = None
        for number, layer in enumerate(self.layers):
            own = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query, key, value = (
                project(normed).unflatten(-1, (-1, size))
                for project in (own.q_proj, own.k_proj, own.v_proj)
            )
            if hasattr(own, "q_norm"):
                query, key = own.q_norm(query), own.k_norm(key)
            query, key = (part * cos + _turned(part) * sin for part in (query, key))
            ahead = None
            if self.forecast is not None:
                seen = normed if before is None else before
                ahead = self.forecast(number, seen, cos, sin).transpose(0, 1)
            before = normed
            hidden = hidden + own.o_proj(attend(number, query, key, value, ahead).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self._model.lm_head(inner.norm(hidden))


def _turned(vectors: Tensor) -> Tensor:
    first, second = vectors.chunk(2, -1)
    return torch.cat((-second, first), -1)


def saved(network: Network, tokens: list[int], file: Path | None) -> Prompt:
    """The prompt of a file, or of the network if there is no such file yet; None: keep none."""
    if file is not None and file.exists():
        return Prompt(**torch.load(file, mmap=True))
    made = network.prompt(tokens)
    if file is None:
        return made
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    torch.save(vars(made), draft)
    draft.replace(file)
    return made
