# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compacting prompts, parking window queries."""

from __future__ import annotations

import pytest
import torch
from reference import rocketkv_bruteforce as brute
from support.pages import row_pack
from support.policies import make_policy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm_sparse.kernels.layout import PageLayout

from vllm_sparse.kv.tail.codec import PageCodec, PlainReader
from vllm_sparse.kv.tail.compaction import QueryParking, compact_prompt, compaction_bytes
from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention
from vllm_sparse.policies.snapkv import SnapKV

CPU = torch.device("cpu")


@pytest.mark.parametrize("prompt_len", [320, 345, 351])
@pytest.mark.parametrize("page_size", [2, 4])
def test_compaction_keeps_what_brute_force_keeps(prompt_len, page_size):
    kv_heads, group, dim, block_size, window, dropped = 2, 3, 16, 32, 8, 6
    generator = torch.Generator().manual_seed(prompt_len)
    layout = PageLayout(block_size, dim, page_size)
    codec = PageCodec(row_pack, block_size, dim, torch.float32, CPU)
    count = -(-prompt_len // block_size)
    cache = torch.full((count + 5, kv_heads, block_size, 2 * dim + 2 * dim // page_size), torch.nan)
    blocks = torch.randperm(count + 5, generator=generator)[:count].int()
    keys, values = (
        torch.randn(kv_heads, count * block_size, dim, generator=generator) for _ in "kv"
    )
    packed = layout.tokens(cache).view(-1, kv_heads, 2 * block_size, dim)
    for i, block in enumerate(blocks.tolist()):
        span = slice(i * block_size, (i + 1) * block_size)
        row_pack(keys[:, span].transpose(0, 1), values[:, span].transpose(0, 1),
                 packed[block : block + 1])  # fmt: skip
    query = torch.randn(kv_heads * group, window, dim, generator=generator)
    before = cache.clone()
    compact_prompt(cache, blocks, prompt_len, dropped, query, reader=codec, layout=layout,
                   policy=make_policy(pool_kernel=5, page_sizes=(page_size,)))  # fmt: skip

    kept = prompt_len - dropped * block_size
    keys, values = keys[:, :prompt_len], values[:, :prompt_len]
    index = brute.select_prompt_tokens(query, keys, kept, 5)
    tail = blocks[dropped:].long()
    rows = layout.tokens(cache)[tail].transpose(0, 1).flatten(1, 2)[:, :kept]
    for head in range(kv_heads):
        assert torch.equal(rows[head, :, :dim], keys[head, index[head]])
        assert torch.equal(rows[head, :, dim:], values[head, index[head]])
    low, high = brute.page_extrema(rows[..., :dim], page_size)
    stored = layout.index(cache)[tail].permute(1, 0, 3, 2).flatten(1, 2)[:, : low.shape[1]]
    assert torch.equal(stored, torch.cat((low, high), -1).float())
    others = torch.ones(len(cache), dtype=torch.bool).scatter_(0, tail, False)
    assert torch.equal(cache[others].nan_to_num(7), before[others].nan_to_num(7))


class Newest(Policy):
    """Keeps the last tokens and reads the last of them: by position, so without an index."""

    Settings, moves, top_k = PolicySettings, True, 8

    def retention(self, prompt_len):
        return Retention(True, 2)

    def keep(self, query_window, keys, count):
        return torch.arange(keys.shape[1] - count, keys.shape[1]).expand(len(keys), -1)


def test_a_policy_without_an_index_has_none_built():
    layout, prompt_len = PageLayout(16, 8, 1, 0), 40
    cache = torch.randn(3, 2, 16, 16)
    tokens = layout.tokens(cache).transpose(0, 1).flatten(1, 2).clone()
    policy = make_policy(Newest, head_dim=8)
    compact_prompt(
        cache, torch.arange(3).int(), prompt_len, 2, torch.empty(4, 0, 8),
        policy=policy, reader=PlainReader(layout), layout=layout,
    )  # fmt: skip
    assert torch.equal(layout.tokens(cache)[2, :, :8], tokens[:, prompt_len - 8 : prompt_len])


@pytest.mark.parametrize("split", [1, 5, 31])
def test_parked_queries_come_back(split):
    layout = PageLayout(32, 16, 4)
    cache = torch.full((9, 2, 32, 40), torch.nan)
    parking = QueryParking(layout, group_size=3)
    tail = torch.tensor([4, 1, 7, 2, 8, 3, 5], dtype=torch.int32)
    queries = torch.randn(31, 6, 16, generator=torch.Generator().manual_seed(0))
    parking.store(cache, tail, 0, queries[:split])
    parking.store(cache, tail, split, queries[split:])
    assert torch.equal(parking.load(cache, tail, 31), queries)
    assert layout.tokens(cache).isnan().all()  # tokens are not touched


class HeldBytes(TorchDispatchMode):
    """The most that tensors on the device ``meta`` take at once, none of which has content."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: x for key, x in self._held.items() if not x[0].expired()}
        self.most = max(self.most, sum(nbytes for _, nbytes in self._held.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "group", "window", "length"), [(8, 4, 32, 131072), (2, 16, 64, 40000), (1, 1, 1, 999)]
)
def test_bytes_of_a_compaction_suffice(heads, group, window, length, dtype):
    """For Llama 3.1 8B and 128K tokens 1.3 GiB in bfloat16, which vLLM has to leave."""
    shape = {"head_dim": 128, "group_size": group, "block_size": 64, "max_model_len": length}
    policy = make_policy(SnapKV, token_budget=512, window=window, **shape)
    layout = PageLayout(64, 128, policy.page_sizes[0], policy.index_width)
    blocks = -(-length // 64)
    content = 2 * 128 + policy.index_width // policy.page_sizes[0]
    with HeldBytes() as held:
        cache = torch.empty(blocks, heads, 64, content, dtype=dtype, device="meta")
        table = torch.empty(blocks, dtype=torch.int32, device="meta")
        query = torch.empty(heads * group, window, 128, dtype=torch.bfloat16, device="meta")
        before = cache.nbytes + table.nbytes + query.nbytes
        compact_prompt(
            cache, table, length, blocks - 8, query, policy=policy, reader=PlainReader(layout),
            layout=layout,
        )  # fmt: skip
    enough = compaction_bytes(length, layout, policy, heads, dtype)
    assert 0.6 * enough < held.most - before <= enough
