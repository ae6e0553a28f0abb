# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Answers one question by many schemes at once, outside the server, from one dense prompt."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.quality.schemes import Held, KeepIdeal, Layer, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.quality.prompts import Network, Prompt


class Lab:
    """One question's prompt, and the dense answer to it where that is needed."""

    def __init__(self, network: Network, prompt: Prompt, max_tokens: int, eos: set[int]) -> None:
        """Answers nothing yet.

        Args:
            network: The model.
            prompt: What it made of the question.
            max_tokens: Length of answers.
            eos: Tokens that end one.
        """
        self._network, self._prompt = network, prompt
        self._max_tokens, self._eos = max_tokens, eos
        self._queries: list[list[Tensor]] = [[] for _ in network.layers]
        self._layers = [
            Layer(
                prompt.keys[number].float(), prompt.values[number].float(),
                prompt.last[number].float(), torch.empty(0), {}, network.heads.scale,
            )
            for number in range(len(network.layers))
        ]  # fmt: skip
        self._generated: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [
            [] for _ in network.layers
        ]

    @cached_property
    def answer(self) -> list[int]:
        """The dense answer's tokens; its queries vote from now on."""
        answer = self._answers({"dense": Scheme()}, record=True)["dense"]
        if self._queries[0]:
            self._layers = [
                layer._replace(ideal=torch.stack(queries, 1))
                for layer, queries in zip(self._layers, self._queries, strict=True)
            ]
        return answer

    def answers(self, schemes: dict[str, Scheme]) -> dict[str, list[int]]:
        """Greedy answers of all schemes, without the token that ends them."""
        if any(isinstance(scheme.keep, KeepIdeal) for scheme in schemes.values()):
            _ = self.answer
        return self._answers(schemes, record=False)

    def _answers(self, schemes: dict[str, Scheme], record: bool) -> dict[str, list[int]]:
        tokens = {name: [int(self._prompt.logits.argmax())] for name in schemes}
        for running, logits in self._decode(schemes, tokens, record):
            for name, token in zip(running, logits.argmax(-1).tolist(), strict=True):
                tokens[name].append(token)
        return {
            name: found[:-1] if found[-1] in self._eos else found for name, found in tokens.items()
        }

    @torch.inference_mode()
    def _decode(
        self, schemes: dict[str, Scheme], tokens: dict[str, list[int]], record: bool
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Each step's names and logits ``[A, vocabulary]``; what follows is added to ``tokens``."""
        layers = range(len(self._layers))
        caches = {name: [self._start(each, at) for at in layers] for name, each in schemes.items()}
        running = list(schemes)
        for step in range(self._max_tokens - 1):
            running = [name for name in running if tokens[name][-1] not in self._eos]
            if not running:
                break

            def attend(
                layer: int, query: Tensor, key: Tensor, value: Tensor, ahead: Tensor | None
            ) -> Tensor:
                dtype = query.dtype
                query, key, value = query.float(), key.float(), value.float()
                if record:
                    self._queries[layer].append(query[0])
                    first = None if ahead is None else ahead[0]
                    self._generated[layer].append((key[0], value[0], first))
                rows = []
                for row, name in enumerate(running):  # noqa: B023 - called at once
                    cache = caches[name][layer]
                    cache.held.forecast = None if ahead is None else ahead[row]
                    rows.append(cache(query[row], key[row], value[row]))
                return torch.stack(rows).to(dtype)

            last = torch.tensor([tokens[name][-1] for name in running])
            position = self._prompt.keys.shape[2] + step
            yield running, self._network.step(last, position, attend)

    @torch.inference_mode()
    def recall(self, scheme: Scheme) -> tuple[list[float], list[float]]:
        """Share of the dense answer's attention to its prompt that the scheme could pay.

        The dense run's queries, keys and values are shown to the scheme step by step. Attention to
        the first four tokens and to the last 64 of the prompt is left out: every scheme has them,
        and they hold most of it.

        Returns:
            Per layer, means over heads and steps: of what is kept, of what is read.
        """
        kept_share, read_share = [], []
        _ = self.answer
        for number, layer in enumerate(self._layers):
            cache = self._start(scheme, number)
            prompt = cache.held.positions.shape[1]
            kept, read, whole = 0.0, 0.0, 0.0
            for query, (key, value, ahead) in zip(
                self._queries[number], self._generated[number], strict=True
            ):
                cache.held.forecast = ahead
                cache(query, key, value)
                groups, _tokens, size = layer.keys.shape
                weight = (query.view(groups, -1, size) @ layer.keys.mT * layer.scale).softmax(-1)
                weight = weight.sum(1)
                weight[:, :4] = 0
                weight[:, -64:] = 0
                held = weight.gather(1, cache.held.positions)
                whole += float(weight.sum())
                kept += float(held.sum())
                if (slots := cache.slots) is not None:
                    there = (slots >= 0) & (slots < prompt)
                    held = held.gather(1, slots.clamp(0, prompt - 1)) * there
                read += float(held.sum())
            kept_share.append(kept / whole)
            read_share.append(read / whole)
        return kept_share, read_share

    def _start(self, scheme: Scheme, number: int) -> _Cache:
        layer = self._layers[number]
        tokens = layer.keys.shape[1]
        count = scheme.count(tokens)
        kept = None if count is None or count >= tokens else scheme.keep(layer, count)
        held = Held(layer, kept, self._max_tokens)
        whole = scheme.read is None or number < scheme.skip
        return _Cache(held, None if whole else scheme.read(tokens))


class _Cache:
    """One scheme's tokens in one layer.

    Attributes:
        held: The tokens.
        slots: What the last step read, [G, k], -1 for none; None: everything.
    """

    def __init__(self, held: Held, read: Callable[[Tensor, Held], Tensor | None] | None) -> None:
        self.held, self._read = held, read
        self.slots: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Holds a token and attends: query [H, D], key and value [G, D] -> [H, D]."""
        held = self.held
        held.append(key, value)
        groups, _, size = held.keys.shape
        grouped = query.view(groups, -1, size)
        self.slots = slots = self._read(grouped, held) if self._read else None
        keys, values = held.keys[:, : held.count], held.values[:, : held.count]
        if slots is not None:
            index = slots.clamp(min=0)[..., None].expand(-1, -1, size)
            keys, values = keys.gather(1, index), values.gather(1, index)
        logits = grouped @ keys.mT * held.scale
        if slots is not None:
            logits = logits.masked_fill((slots < 0)[:, None], -torch.inf)
        return (logits.softmax(-1) @ values).view(-1, size)
