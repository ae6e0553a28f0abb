# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Reading pages as stock kernels pack them."""

from __future__ import annotations

import platform

import pytest
import torch
from support.pages import row_pack

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kv.tail.codec import PageCodec

CPU = torch.device("cpu")


def stock_pack(isa: str):
    """vLLM's own CPU kernel as the packer of pages."""
    ops = pytest.importorskip("vllm._custom_ops")
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    def pack(key, value, pages):
        key_pages, value_pages = pages.chunk(2, 2)
        slots = torch.arange(len(key))
        ops.cpu_attn_reshape_and_cache(key, value, key_pages, value_pages, slots, isa)

    return pack


@pytest.mark.vllm
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codec_reads_what_the_stock_kernel_wrote(dtype, dim, block_size):
    cpu_attn = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    pack = stock_pack(cpu_attn._get_attn_isa(dtype, block_size, dim))
    check(pack, block_size, dim, dtype)


@pytest.mark.vllm
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.cpu._is_avx512_supported(),
    reason="vLLM has the kernel in its build for x86 with AVX-512 only",
)
@pytest.mark.parametrize(("block_size", "dim"), [(32, 64), (96, 128)])
def test_codec_reads_the_tiles_of_amx(block_size, dim):
    """On any x86: only to read them needs AMX."""
    check(stock_pack("amx"), block_size, dim, torch.bfloat16)


def check(pack, block_size, dim, dtype):
    codec = PageCodec(pack, block_size, dim, dtype, CPU)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(block_size, 3, dim, generator=generator).to(dtype) for _ in "kv")
    pages = torch.zeros(1, 3, 2 * block_size, dim, dtype=dtype)
    pack(key, value, pages)
    cache = pages.view(1, 3, block_size, 2 * dim)
    assert torch.equal(codec.keys(cache), key.transpose(0, 1))
    assert torch.equal(codec.values(cache), value.transpose(0, 1))
    slot, head = torch.arange(block_size)[:, None], torch.arange(3)
    rows = codec.at(cache, torch.zeros_like(slot), head, slot)
    assert torch.equal(rows, torch.cat((key, value), -1))


def test_codec_refuses_an_unknown_packing():
    def scrambled(key, value, pages):
        row_pack(key.flip(0), value.flip(0), pages)

    with pytest.raises(UnsupportedError, match="does not know"):
        PageCodec(scrambled, 32, 64, torch.float32, CPU)
