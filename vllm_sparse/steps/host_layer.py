# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Executes one layer's step of SPARDA, on any device: store, choose, fetch ahead, attend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vllm_sparse.kernels.fp8 import UNSCALED, Scales, encode, readable
from vllm_sparse.kernels.reference.sparda_tokens import mean_of_windows
from vllm_sparse.kernels.types import Blocks, NewWindows, Selected, Unframed
from vllm_sparse.steps.host_prompt import attend_prompt
from vllm_sparse.steps.host_step import WindowList

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_sparse.kernels.dispatch import SpardaKernels
    from vllm_sparse.kv.host.pager import Pager
    from vllm_sparse.policies.selectors import Selector
    from vllm_sparse.policies.sparda import SpardaSettings
    from vllm_sparse.prefetch.fetcher import Fetcher
    from vllm_sparse.prefetch.stream import PromptStream
    from vllm_sparse.steps.host_step import (
        DecodeRows,
        FreshRows,
        PromptRow,
        SpardaStep,
        WindowRows,
    )


class HasCache(Protocol):
    """An attention layer of the engine, whose cache tensor holds compressed keys."""

    kv_cache: Tensor


@dataclass
class Runtime:
    """What all layers of one worker share.

    Attributes:
        settings: The settings.
        scale: Logit scale.
        pager: Blocks and frames.
        kernels: What layers run.
        selector: Chooses blocks.
        fetcher: Brings what decode rows read.
        stream: Earlier blocks of prompts, on their way back.
        layers: The engine's attention layers, in order.
        attend_fresh: Serves prompt rows without a past; ``None`` if they are streamed like others.
        prompt_selector: Chooses blocks of tokens of sparse prompts; ``None``: the selector does.
    """

    settings: SpardaSettings
    scale: float
    pager: Pager
    kernels: SpardaKernels
    selector: Selector
    fetcher: Fetcher
    stream: PromptStream
    layers: Sequence[HasCache]
    attend_fresh: Callable[[Tensor, Tensor, Tensor, FreshRows, float], Tensor] | None = None
    prompt_selector: Selector | None = None
    _views: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _same_for_all: Selected | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.blocks = Blocks(
            settings.block_size,
            settings.kernel_stride,
            settings.init_blocks,
            settings.local_blocks,
            settings.blocks_read,
        )
        self.prompt_blocks = self.blocks._replace(top_k=settings.prompt_blocks_read)

    @property
    def step(self) -> Tensor:
        """Number of the step, int64 ``[1]``."""
        return self.fetcher.step

    def compressed(self, layer: int) -> Tensor:
        """A layer's compressed keys, ``[blocks, G, windows per block, D]``, a view."""
        cache = self.layers[layer].kv_cache
        seen, view = self._views.get(layer, (None, None))
        if seen is not cache or view is None:
            geometry = self.pager.geometry
            view = cache.view(len(cache), geometry.num_kv_heads, -1, geometry.head_dim)
            self._views[layer] = cache, view
        return view

    def poll(self) -> None:
        """Called between steps, and so never while a graph is captured."""
        self.fetcher.poll()
        self.stream.poll()

    def begin_step(self, step: SpardaStep) -> None:
        """Called by the first layer, whose step a graph may capture."""
        self._same_for_all = None
        rows = step.decode
        chooses = rows is not None and rows.whole and rows.scored
        self.selector.begin(rows.tokens if rows is not None and chooses else None)
        self.fetcher.begin_step()
        self.stream.begin_step(step.tiles)

    def end_step(self) -> None:
        """Called by the last layer, so that nothing waits for a later step to be counted."""
        self.fetcher.end_step()
        self.stream.end_step()

    def select(self, layer: int, rows: DecodeRows, query: Tensor | None) -> Selected:
        """What decode rows read in a layer.

        Args:
            layer: The layer.
            rows: The rows.
            query: The layer's queries of the whole batch; ``None`` while the one before computes.
        """
        vectors = None
        if rows.scored and self.selector.ranking.rotary is not None:
            index = rows.tokens.index
            vectors = self.selector.unrotated(layer, len(index), None if rows.whole else index)
        elif rows.scored:
            vectors = self.selector.vectors(layer, rows.tokens, query)
        elif self._same_for_all is not None:
            return self._same_for_all
        selected = self.kernels.select_blocks(
            self.compressed(layer),
            vectors,
            rows.table,
            rows.framed,
            self.selector.ranking,
            self.blocks,
            dense_len=self.settings.dense_len,
        )
        if not rows.scored:
            self._same_for_all = selected
        return selected


class Layer:
    """One layer.

    Args:
        runtime: Shared by all layers.
        number: Position of the layer in the model.
        scales: Of its keys and values in an fp8 cache.
    """

    def __init__(self, runtime: Runtime, number: int, scales: Scales = UNSCALED) -> None:
        self.runtime = runtime
        self.number = number
        self.scales = scales
        self.pager = runtime.pager.layers[number]
        self.last = number + 1 == len(runtime.layers)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, step: SpardaStep, output: Tensor
    ) -> None:
        """Store the new tokens of a step, and attend.

        Args:
            query: Post-RoPE queries, ``[tokens, H, D]``.
            key: ``[tokens, G, D]``.
            value: ``[tokens, G, D]``.
            step: The step, whose padding is cut off.
            output: Written, ``[tokens or more, H, D]``.
        """
        runtime, pager = self.runtime, self.pager
        if self.number == 0:
            runtime.begin_step(step)
        # A fetch that is under way would overwrite this step's tokens in a frame.
        runtime.fetcher.wait(self.number)
        if pager.poison:
            pager.poison_fresh(step.slots)
        windows, completed, queries = step.windows, None, None
        if not isinstance(windows, WindowList):  # single tokens
            completed = self._new_windows(windows)
            queries = runtime.selector.keeping(self.number, query)
        runtime.kernels.write_tokens(
            pager.host,
            pager.slab,
            pager.table.frame_of,
            step.slots,
            key,
            value,
            completed,
            self.scales,
            queries,
        )
        if isinstance(windows, WindowList):
            # As later steps will read them, so that the size of a chunk changes nothing.
            key, value = self._as_stored(key, value)
            self._compress(key, windows)
        if step.decode is not None:
            self._decode(query, step.decode, output)
        if step.fresh is not None:
            self._attend_fresh(query, key, value, step.fresh, output)
        if step.prompts:
            self._attend_prompts(query, torch.cat((key, value), -1), step, output)
        if isinstance(windows, WindowList):
            runtime.selector.record(self.number, query, step.slots, step.last_in_block)
        if self.last:
            runtime.end_step()

    def _new_windows(self, rows: WindowRows) -> NewWindows:
        stride = self.runtime.settings.kernel_stride
        compressed = self.runtime.compressed(self.number)
        return NewWindows(compressed, rows.positions, rows.table, stride)

    def _compress(self, key: Tensor, windows: WindowList) -> None:
        """Add the windows that this step completes; they may reach into earlier blocks."""
        if not windows.slots.shape[0]:
            return
        pager, compressed = self.pager, self.runtime.compressed(self.number)
        size, per_block = pager.block_size, compressed.shape[2]
        block, offset = windows.older // size, windows.older % size
        older = pager.host[block, :, offset, : key.shape[2]]
        means = mean_of_windows(torch.cat((key, older))[windows.tokens]) * self.scales.key
        target = windows.slots // per_block, slice(None), windows.slots % per_block
        compressed[target] = means.to(compressed.dtype)

    def _as_stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache makes of a step's tokens, in its dtype."""
        scales, dtype = self.scales, self.pager.host.dtype
        return (
            encode(key, dtype, scales.key, scales.truncates),
            encode(value, dtype, scales.value, scales.truncates),
        )

    def _decode(self, query: Tensor, rows: DecodeRows, output: Tensor) -> None:
        runtime, pager, fetcher = self.runtime, self.pager, self.runtime.fetcher
        if not fetcher.announced(self.number):
            chosen = runtime.select(self.number, rows, query)
            fetcher.announce(self.number, chosen, ahead=False)
        if runtime.selector.ahead and not self.last:
            chosen = runtime.select(self.number + 1, rows, None)
            fetcher.announce(self.number + 1, chosen, ahead=True)
        frames, lengths = fetcher.take(self.number)
        unframed = None
        if rows.unframed is not None:
            unframed = Unframed(pager.host, rows.table, rows.unframed)
        if not rows.whole:
            query = query[rows.tokens.index]
        target = output[: query.shape[0]] if rows.whole else torch.empty_like(query)
        runtime.kernels.attend_frames(
            pager.slab, query, target, frames, lengths, runtime.scale, unframed, self.scales
        )
        if not rows.whole:
            output[rows.tokens.index] = target

    def _attend_fresh(
        self, query: Tensor, key: Tensor, value: Tensor, rows: FreshRows, output: Tensor
    ) -> None:
        assert self.runtime.attend_fresh is not None, "the planner set such rows apart"
        mine = query[rows.index], key[rows.index], value[rows.index]
        query, key, value = (readable(part).to(query.dtype) for part in mine)
        scale = self.runtime.scale * self.scales.key
        attended = self.runtime.attend_fresh(query, key, value, rows, scale)
        # fp8 numbers are exact in the dtype of the queries; times their scales they are not.
        factor = self.scales.value
        output[rows.index] = attended if factor == 1.0 else attended * factor

    def _attend_prompts(
        self, query: Tensor, rows: Tensor, step: SpardaStep, output: Tensor
    ) -> None:
        """Attend the rows that stream their earlier blocks; ``rows`` is ``[tokens, G, 2 * D]``."""
        runtime, settings = self.runtime, self.runtime.settings
        choices: list[Tensor | None] = []
        for prompt in step.prompts:  # all of them first: then it is known what to stream
            chosen = None
            if prompt.sparse_from < len(prompt):
                chosen = self._choose_prompt(query, prompt)
                earlier = prompt.start // settings.block_size
                runtime.stream.note_needs(prompt.tiles, chosen, earlier)
            choices.append(chosen)
        for prompt, chosen in zip(step.prompts, choices, strict=True):
            here = slice(prompt.begin, prompt.end)
            tiles = (
                (step.tiles[i], runtime.stream.read(self.number, i)) for i in range(*prompt.tiles)
            )
            output[here] = attend_prompt(
                query[here],
                rows[here],
                tiles,
                prompt.start,
                prompt.sparse_from,
                chosen,
                block_size=settings.block_size,
                tile_tokens=settings.staging_blocks * settings.block_size,
                attend_part=runtime.kernels.attend_part,
                scale=runtime.scale * self.scales.key,
                value_scale=self.scales.value,
            )

    def _choose_prompt(self, query: Tensor, prompt: PromptRow) -> Tensor:
        """Blocks that the sparse tokens of a row read, bool ``[G, T, blocks]``."""
        runtime, selector = self.runtime, self.runtime.selector
        outputs = max(prompt.output_from, prompt.sparse_from)
        compressed, chosen = runtime.compressed(self.number), []
        for part, blocks, chooses in (
            (
                slice(prompt.sparse_from, outputs),
                runtime.prompt_blocks,
                runtime.prompt_selector or selector,
            ),
            (slice(outputs, None), runtime.blocks, selector),
        ):
            tokens = prompt.tokens[part]
            if len(tokens.positions):
                vectors = chooses.vectors(self.number, tokens, query)
                ranking = chooses.ranking._replace(rotary=None)  # vectors come turned
                chosen.append(
                    runtime.kernels.choose_blocks(
                        compressed,
                        vectors,
                        prompt.blocks,
                        tokens.positions,
                        ranking,
                        blocks,
                    )
                )
        # One part as it is: at a million tokens it has a gigabyte.
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)
