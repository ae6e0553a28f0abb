# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Reads keys and values back out of pages, also where a stock kernel packs them its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.features import POLICIES, reason
from vllm_sparse.kernels.fp8 import FP8

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout

# Each unpacks the key half or the value half of pages, [pages, G, block_size * D], to
# [pages, G, block_size, D].
Unpack = Callable[[Tensor, int, int], Tensor]


def _rows(half: Tensor, block_size: int, dim: int) -> Tensor:
    return half.unflatten(-1, (block_size, dim))


def _columns(half: Tensor, block_size: int, dim: int) -> Tensor:
    return half.unflatten(-1, (dim, block_size)).transpose(-1, -2)


def _vnni_keys(half: Tensor, block_size: int, dim: int) -> Tensor:
    tiles = half.unflatten(-1, (block_size // 16, dim // 2, 16, 2))
    return tiles.permute(0, 1, 2, 4, 3, 5).reshape(*half.shape[:2], block_size, dim)


def _vnni_values(half: Tensor, block_size: int, dim: int) -> Tensor:
    tiles = half.unflatten(-1, (dim // 16, block_size // 2, 16, 2))
    return tiles.permute(0, 1, 3, 5, 2, 4).reshape(*half.shape[:2], block_size, dim)


_KEY_FORMATS: tuple[Unpack, ...] = (_rows, _columns, _vnni_keys)
_VALUE_FORMATS: tuple[Unpack, ...] = (_rows, _vnni_values)


class Reader(Protocol):
    """Reads keys and values from a cache ``[blocks, G, block_size, C]``."""

    def keys(self, pages: Tensor) -> Tensor:
        """Keys of consecutive blocks ``[blocks, G, block_size, C]`` as ``[G, tokens, D]``."""
        ...

    def values(self, pages: Tensor) -> Tensor:
        """Values of consecutive blocks ``[blocks, G, block_size, C]`` as ``[G, tokens, D]``."""
        ...

    def at(self, cache: Tensor, block: Tensor, head: Tensor, slot: Tensor) -> Tensor:
        """Single tokens.

        Args:
            cache: The cache.
            block: Block ids, int64.
            head: KV heads, int64, broadcastable to ``block``.
            slot: Places in the block, int64, broadcastable to ``block``.

        Returns:
            Key, then value, ``[..., 2 * D]``.
        """
        ...


class PlainReader:
    """Pages of plain rows.

    Args:
        layout: Page geometry.
    """

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout

    def keys(self, pages: Tensor) -> Tensor:
        """Keys of consecutive blocks as ``[G, tokens, D]``."""
        rows = self._layout.tokens(pages)[..., : self._layout.head_dim]
        return rows.transpose(0, 1).flatten(1, 2)

    def values(self, pages: Tensor) -> Tensor:
        """Values of consecutive blocks as ``[G, tokens, D]``."""
        rows = self._layout.tokens(pages)[..., self._layout.head_dim :]
        return rows.transpose(0, 1).flatten(1, 2)

    def at(self, cache: Tensor, block: Tensor, head: Tensor, slot: Tensor) -> Tensor:
        """Single tokens, ``[..., 2 * D]``."""
        return self._layout.tokens(cache)[block, head, slot]


class PageCodec:
    """Unpacks stock pages. The packing is found by trying, not by trusting a version.

    Args:
        pack: The stock kernel's write, called as ``pack(key, value, pages)`` with
            ``[block_size, G, D]`` twice and zeroed ``pages``, ``[1, G, 2 * block_size, D]``, which
            for an fp8 cache are bytes.
        block_size: Tokens per page.
        dim: D.
        dtype: Of keys and values, and of the cache unless it is fp8.
        device: Cache device.
        fp8: Whether the cache is.

    Raises:
        UnsupportedError: The stock kernel packs pages in an unknown way.
    """

    def __init__(
        self,
        pack: Callable[[Tensor, Tensor, Tensor], None],
        block_size: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        fp8: bool = False,
    ) -> None:
        self.block_size = block_size
        self.dim = dim
        generator = torch.Generator().manual_seed(0)
        key, value = (
            torch.randn(block_size, 2, dim, generator=generator).to(device, dtype) for _ in "kv"
        )
        pages = torch.zeros(1, 2, 2 * block_size, dim, dtype=dtype, device=device)
        if fp8:  # numbers that any conversion leaves as they are, without negative zeros
            key, value = (part.to(FP8).to(dtype) + 0.0 for part in (key, value))
            pages = pages.to(torch.uint8)
        pack(key, value, pages)
        if fp8:
            key, value = (part.to(FP8).view(torch.uint8) for part in (key, value))
        key_half, value_half = (half.flatten(2) for half in pages.chunk(2, 2))
        self._unpack_key = self._matching(_KEY_FORMATS, key_half, key)
        self._unpack_value = self._matching(_VALUE_FORMATS, value_half, value)
        place = torch.arange(block_size * dim, device=device)[None, None]
        self._places = torch.cat(
            (
                self._unpack_key(place, block_size, dim)[0, 0],
                self._unpack_value(place, block_size, dim)[0, 0] + block_size * dim,
            ),
            -1,
        )

    def _matching(self, formats: tuple[Unpack, ...], half: Tensor, expected: Tensor) -> Unpack:
        for unpack in formats:
            divisible = unpack in (_rows, _columns) or not (self.block_size % 16 or self.dim % 16)
            if divisible and torch.equal(
                unpack(half, self.block_size, self.dim)[0].transpose(0, 1), expected
            ):
                return unpack
        sizes = {"size": self.block_size, "dim": self.dim, "dtype": half.dtype}
        raise UnsupportedError(reason("packing", POLICIES, False, **sizes))

    def _half(self, pages: Tensor, second: bool) -> Tensor:
        size = self.block_size * self.dim
        return pages.flatten(2)[..., second * size : (second + 1) * size]

    def keys(self, pages: Tensor) -> Tensor:
        """Keys of consecutive pages ``[pages, G, block_size, C]`` as ``[G, tokens, D]``."""
        unpacked = self._unpack_key(self._half(pages, False), self.block_size, self.dim)
        return unpacked.transpose(0, 1).flatten(1, 2)

    def values(self, pages: Tensor) -> Tensor:
        """Values of consecutive pages ``[pages, G, block_size, C]`` as ``[G, tokens, D]``."""
        unpacked = self._unpack_value(self._half(pages, True), self.block_size, self.dim)
        return unpacked.transpose(0, 1).flatten(1, 2)

    def at(self, cache: Tensor, block: Tensor, head: Tensor, slot: Tensor) -> Tensor:
        """Single tokens, key, then value, ``[..., 2 * D]``."""
        start = block * cache.stride(0) + head * cache.stride(1)
        index = start.unsqueeze(-1) + self._places[slot]
        flat = cache.as_strided((cache.shape[0] * cache.stride(0),), (1,))
        return flat[index]
