# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Sizes of a SPARDA cache: how many blocks the host holds and how many frames the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from vllm_sparse.policies.sparda import SpardaSettings

GIB = 1 << 30


@dataclass(frozen=True)
class Geometry:
    """One rank's cache. A piece is one block of one KV head in one layer, keys and values.

    Attributes:
        num_layers: Attention layers.
        num_blocks: Blocks per layer, vLLM's null block included.
        num_kv_heads: G of this rank.
        block_size: Tokens per block.
        head_dim: D.
        itemsize: Bytes per element.
        frames: Frames of each layer, one piece each.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    itemsize: int
    frames: tuple[int, ...]

    @property
    def num_pieces(self) -> int:
        """Pieces of one layer."""
        return self.num_blocks * self.num_kv_heads

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece."""
        return self.block_size * 2 * self.head_dim * self.itemsize

    @property
    def slab_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(self.frames) * self.piece_bytes

    def is_resident(self, layer: int) -> bool:
        """Whether a layer has a frame for every piece, so that nothing is ever fetched."""
        return self.frames[layer] == self.num_pieces


def block_bytes(
    num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, itemsize: int
) -> int:
    """Host bytes of one block in all layers."""
    return num_layers * num_kv_heads * block_size * 2 * head_dim * itemsize


def gib_of(nbytes: int) -> float:
    """Bytes in GiB, rounded up to hundredths."""
    return -(-nbytes * 100 // GIB) / 100


def blocks_of_one(settings: SpardaSettings, max_model_len: int) -> int:
    """Blocks of one request of ``max_model_len`` tokens, and vLLM's null block."""
    return -(-max_model_len // settings.block_size) + 1


def staging_pieces(settings: SpardaSettings, num_kv_heads: int) -> int:
    """Pieces of the staging area: one half is filled while the other is read."""
    return 2 * settings.staging_blocks * num_kv_heads


def compressed_bytes(
    settings: SpardaSettings, blocks: int, bytes_per_block: int, itemsize: int
) -> int:
    """Device bytes of a pool's compressed keys: one of two strides, not in fp8.

    Args:
        settings: For ``kernel_stride``.
        blocks: Of the pool.
        bytes_per_block: Keys and values of one block in all layers.
        itemsize: Bytes of each of their elements.
    """
    numbers = blocks * bytes_per_block // itemsize
    return numbers * max(itemsize, 2) // (2 * settings.kernel_stride)


def held_gib(
    settings: SpardaSettings, room_bytes: int, bytes_per_block: int, itemsize: int
) -> float:
    """The largest pool of which a device holds every block, in GiB, rounded down to hundredths.

    Args:
        settings: As of :func:`compressed_bytes`.
        room_bytes: Device memory for frames and compressed keys.
        bytes_per_block: As of :func:`compressed_bytes`.
        itemsize: As of :func:`compressed_bytes`.
    """
    each = bytes_per_block + compressed_bytes(settings, 1, bytes_per_block, itemsize)
    return max(room_bytes, 0) // each * bytes_per_block * 100 // GIB / 100


def host_blocks(settings: SpardaSettings, bytes_per_block: int, max_model_len: int) -> int:
    """Blocks that fit the host pool.

    Args:
        settings: For ``host_gib``.
        bytes_per_block: Host bytes of one block in all layers.
        max_model_len: Longest request, in tokens.

    Returns:
        Number of blocks, vLLM's null block included.

    Raises:
        ConfigError: Not even one request of ``max_model_len`` fits.
    """
    blocks = int(settings.host_gib * GIB) // bytes_per_block
    needed = blocks_of_one(settings, max_model_len)
    if blocks < needed:
        raise ConfigError(
            f"vllm_sparse.host_gib: {settings.host_gib} GiB hold {blocks} blocks of "
            f"{settings.block_size} tokens ({bytes_per_block / 1024:.0f} KiB each over all "
            f"layers), but one request of --max-model-len {max_model_len} needs {needed}. Set "
            f"host_gib to at least {gib_of(needed * bytes_per_block):.2f} or lower --max-model-len"
        )
    return blocks


def blocks_per_row(settings: SpardaSettings, max_model_len: int) -> int:
    """Most blocks that one decode token reads per KV head."""
    dense = -(-settings.dense_len // settings.block_size)
    longest = -(-max_model_len // settings.block_size)
    return min(max(settings.blocks_read, dense), longest)


def fit_slab(
    settings: SpardaSettings,
    *,
    room_bytes: int,
    num_layers: int,
    num_pieces: int,
    num_kv_heads: int,
    piece_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
) -> tuple[int, int]:
    """The largest slab that there is room for, and how many requests it serves at once.

    Args:
        settings: For ``resident_first_layer`` and what a token reads.
        room_bytes: Device memory for frames.
        num_layers: Attention layers.
        num_pieces: Pieces of one layer in the host pool.
        num_kv_heads: G of this rank.
        piece_bytes: Bytes of a piece.
        max_num_seqs: Most requests in a step, if the slab does not allow fewer.
        max_model_len: Longest request, in tokens.

    Returns:
        Bytes of the slab, and requests.

    Raises:
        ConfigError: Not even one request, with the arithmetic.
    """
    first = num_pieces if settings.resident_first_layer else 0
    paged = num_layers - bool(first)
    per_request = num_kv_heads * blocks_per_row(settings, max_model_len)
    each = (room_bytes // piece_bytes - first) // max(paged, 1)
    if each >= num_pieces or (not paged and each >= 0):
        return num_layers * num_pieces * piece_bytes, max_num_seqs
    if each < per_request:
        least = (per_request * paged + first) * piece_bytes
        raise ConfigError(
            f"vllm_sparse: {max(room_bytes, 0) / GIB:.2f} GiB will be left on this device, but "
            f"frames for what one request reads in a step take {least / GIB:.2f} GiB. Raise "
            "--gpu-memory-utilization, or lower --max-num-batched-tokens, top_k or dense_len. What "
            "is left is an estimate; if you know of more, set slab_gib"
        )
    return (first + each * paged) * piece_bytes, min(max_num_seqs, each // per_request)


def plan_frames(
    settings: SpardaSettings,
    *,
    num_layers: int,
    num_pieces: int,
    num_kv_heads: int,
    piece_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
) -> tuple[int, ...]:
    """How many frames each layer gets.

    Args:
        settings: For ``slab_gib``, ``resident``, ``resident_first_layer`` and what a token reads.
        num_layers: Attention layers.
        num_pieces: Pieces of one layer in the host pool.
        num_kv_heads: G of this rank.
        piece_bytes: Bytes of a piece.
        max_num_seqs: Most requests in a step.
        max_model_len: Longest request, in tokens.

    Returns:
        Frames of each layer, at most ``num_pieces``.

    Raises:
        ConfigError: The slab cannot hold what one step may read, with the arithmetic.
    """
    if settings.resident:
        return (num_pieces,) * num_layers
    per_row = blocks_per_row(settings, max_model_len)
    needed = min(max_num_seqs * num_kv_heads * per_row, num_pieces)
    first = num_pieces if settings.resident_first_layer else 0
    paged = num_layers - bool(first)
    if settings.slab_gib is None:
        each = min(2 * needed, num_pieces)
    else:
        available = int(settings.slab_gib * GIB) - first * piece_bytes
        each = min(available // (paged * piece_bytes) if paged else 0, num_pieces)
        if paged and each < needed:
            least = (needed * paged + first) * piece_bytes
            resident = f" + {first} of the resident layer 0" if first else ""
            raise ConfigError(
                f"vllm_sparse.slab_gib: {settings.slab_gib} GiB are too small for one step: "
                f"--max-num-seqs {max_num_seqs} x {num_kv_heads} KV heads x {per_row} blocks = "
                f"{needed} frames in each of {paged} layers{resident}, {piece_bytes / 1024:.0f} "
                f"KiB each, are {-(-least * 1000 // GIB) / 1000:.3f} GiB. Raise slab_gib, or "
                "lower --max-num-seqs, top_k or dense_len"
            )
    return (*([first] if first else []), *([each] * paged))
