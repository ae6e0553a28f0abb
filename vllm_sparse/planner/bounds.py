# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The fewest bytes that a decode step must move.

Every input is counted once, every output once, intermediate results not at all. Times follow with
the bandwidth of a copy, measured in the same run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm_sparse.planner.shapes import ITEM_BYTES

if TYPE_CHECKING:
    from vllm_sparse.planner.shapes import Shape
    from vllm_sparse.policies.protocol import Policy


class Split(NamedTuple):
    """What ROCKETKV holds and reads of one request.

    Tokens held after stage 1, tokens per page of extrema, channels and tokens that stage 2 reads;
    without it, all held tokens are read.
    """

    held: int
    page_size: int
    top_r: int
    top_k: int
    stage2: bool = True


def split_by(policy: Policy, context: int) -> Split:
    """What a policy holds and reads of a prompt of `context` tokens.

    Of pages without a fused kernel, scores read the whole index.
    """
    found = policy.retention(context)
    first, last = policy.freed_blocks(context, context) if found.sparse else (0, 0)
    held = context - (last - first) * policy.shape.block_size
    channels = found.top_r if policy.kernel else policy.index_width
    stage2 = policy.top_k is not None and found.sparse
    return Split(held, found.page_size, channels, policy.top_k or 0, stage2)


def score_bytes(shape: Shape, rows: int, split: Split) -> int:
    """The selected channels of all pages; queries."""
    pages = -(-split.held // split.page_size)
    channels = shape.kv_heads * split.top_r * pages
    return ITEM_BYTES * rows * (channels + shape.heads * shape.head_dim)


def attend_bytes(shape: Shape, rows: int, tokens: int) -> int:
    """Keys and values of the tokens; queries and outputs."""
    heads = 2 * shape.kv_heads * tokens + 2 * shape.heads
    return ITEM_BYTES * rows * heads * shape.head_dim


def select_blocks_bytes(shape: Shape, rows: int, context: int, stride: int, top_k: int) -> int:
    """SPARDA: compressed keys and a Forecast in, a block and a piece per choice out."""
    read = ITEM_BYTES * rows * shape.kv_heads * shape.head_dim * (context // stride + 1)
    return read + 2 * 4 * rows * shape.kv_heads * top_k


def layer_bytes(shape: Shape, rows: int, context: int, split: Split | None) -> int:
    """What the attention of one layer reads in a decode step; dense without a split."""
    if split is None:
        return attend_bytes(shape, rows, context)
    if not split.stage2:
        return attend_bytes(shape, rows, split.held)
    read = min(split.top_k, split.held)
    return score_bytes(shape, rows, split) + attend_bytes(shape, rows, read)


def step_bytes(shape: Shape, rows: int, context: int, split: Split | None = None) -> float:
    """What a decode step of the whole model reads, but windows and states."""
    return shape.step_weight_bytes(rows) + shape.kv_layers * layer_bytes(
        shape, rows, context, split
    )


def most_rows(pool_tokens: int, tokens_per_row: int, once: int = 0) -> int:
    """Requests that fit a KV pool.

    Args:
        pool_tokens: Size of the pool.
        tokens_per_row: What each request holds.
        once: Room that is needed only once, as for the prompt that is being prefilled.
    """
    return max(0, (pool_tokens - once) // tokens_per_row)


class PagedStep(NamedTuple):
    """A decode step of SPARDA, in ms: weights, compressed keys and selected blocks over the
    device's bandwidth; fetched blocks over the link's.
    """

    compute_ms: float
    transfer_ms: float

    @property
    def blocking_ms(self) -> float:
        """One after the other."""
        return self.compute_ms + self.transfer_ms

    @property
    def prefetched_ms(self) -> float:
        """Both at once."""
        return max(self.compute_ms, self.transfer_ms)


def paged_step(
    shape: Shape,
    rows: int,
    context: int,
    blocks: tuple[int, int, int],
    bytes_fetched: float,
    device_bytes_per_s: float,
    link_bytes_per_s: float,
) -> PagedStep:
    """Bounds of a decode step.

    Args:
        shape: Of the model.
        rows: Requests.
        context: Tokens of each.
        blocks: How many are read, tokens in each, and tokens from one compressed key to the next.
        bytes_fetched: Over the link.
        device_bytes_per_s: Of a copy on the device.
        link_bytes_per_s: Of a copy to the device.
    """
    top_k, size, stride = blocks
    layer = attend_bytes(shape, rows, top_k * size)
    layer += select_blocks_bytes(shape, rows, context, stride, top_k)
    read = shape.step_weight_bytes(rows) + shape.kv_layers * layer
    return PagedStep(1e3 * read / device_bytes_per_s, 1e3 * bytes_fetched / link_bytes_per_s)
