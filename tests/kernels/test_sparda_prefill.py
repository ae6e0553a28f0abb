# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompts over parts of the keys: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from support.kernels import REFERENCE, close, device_of, noise, sparda, with_gaps
from vllm_sparse.kernels.reference.sparda_prefill import merge_parts

PARTS = [
    # dtype, D, heads per KV head, block size, tokens, first position, keys
    (torch.float32, 64, 1, 16, 50, 32, 75),
    (torch.bfloat16, 128, 16, 64, 19, 128, 200),
    (torch.float16, 80, 7, 32, 23, 37, 90),
    (torch.bfloat16, 96, 3, 128, 65, 256, 128),
    (torch.float32, 256, 2, 64, 9, 70, 1),
]


@pytest.mark.parametrize("mode", ["all", "causal", "past", "chosen", "chosen-past"])
@pytest.mark.parametrize("shape", PARTS, ids=lambda s: "-".join(str(v) for v in s))
def test_parts_of_prompts_equal_reference(ours, shape, mode):
    device = device_of(ours)
    dtype, dim, group, block_size, tokens, first, num_keys = shape
    generator = torch.Generator().manual_seed(dim)
    kv_heads = 2
    if mode == "causal":
        num_keys = tokens
    query = noise(
        tokens, kv_heads * group + 1, dim, generator=generator, device=device, dtype=dtype
    )[:, 1:]
    query = query.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3)
    rows = with_gaps(
        noise(kv_heads, num_keys, 2 * dim, generator=generator, device=device, dtype=dtype), 2
    )
    keys, values = rows.split(dim, -1)
    options = {"first_position": first, "block_size": block_size}
    chosen = None
    if "chosen" in mode:
        blocks = -(-(first + num_keys) // block_size)
        chosen = torch.rand(kv_heads, tokens, blocks + 2, generator=generator) < 0.4
        chosen[0, 3] = chosen[1, : tokens // 2] = False  # see nothing
        wide = torch.ones(kv_heads, tokens + 1, blocks + 3, dtype=torch.bool)
        wide[:, :tokens, : blocks + 2] = chosen
        chosen = wide.to(device)[:, :tokens, : blocks + 2]
    if mode == "causal":
        options["past_from"] = first
    if "past" in mode:
        options["past_from"] = first + num_keys // 2 - tokens // 2
    arguments = query, keys, values, chosen, 0.11
    expected, expected_lse = REFERENCE.attend_part(*arguments, **options)
    output, lse = ours.attend_part(*arguments, **options)
    assert output.dtype == lse.dtype == torch.float32
    assert output.shape == expected.shape
    close(output, expected, dtype)
    close(lse, expected_lse, dtype)
    hidden = expected_lse == -torch.inf
    assert hidden.any() or "chosen" not in mode
    assert not output[hidden].any()

    # The same once more, added to another part whose entries lie apart.
    before = noise(tokens, kv_heads, group, dim, generator=generator, device=device)
    sums = noise(tokens, kv_heads, group, generator=generator, device=device)
    sums[::2] = -torch.inf
    before[::2] = 0.0
    before, sums = with_gaps(before, 3).permute(1, 2, 0, 3), with_gaps(sums, 3).permute(1, 2, 0)
    merged = merge_parts(before, sums, expected, expected_lse)
    found = ours.attend_part(*arguments, **options, total=(before, sums))
    for actual, theirs, place in zip(found, merged, (before, sums), strict=True):
        assert actual is place
        close(actual, theirs, dtype)


@pytest.mark.parametrize("every", ["reference", "cpu", "triton"], indirect=True)
def test_blocks_that_no_query_of_a_tile_chose_are_not_read(every):
    """Nobody has copied them."""
    device = device_of(every)
    generator = torch.Generator().manual_seed(0)
    query = noise(1, 2, 40, 64, generator=generator, device=device)
    rows = torch.full((1, 7 * 32, 128), torch.nan, device=device)
    chosen = torch.zeros(1, 40, 9, dtype=torch.uint8, device=device)
    for block in (3, 6):  # the keys begin with block 1
        rows[:, (block - 1) * 32 : block * 32] = noise(
            1, 32, 128, generator=generator, device=device
        )
        chosen[:, block::2, block] = 1
    keys, values = rows.split(64, -1)
    arguments = query, keys, values, chosen, 0.1
    options = {"first_position": 32, "block_size": 32}
    output, lse = every.attend_part(*arguments, **options)
    arguments = query, keys.nan_to_num(), values.nan_to_num(), chosen, 0.1
    expected, expected_lse = REFERENCE.attend_part(*arguments, **options)
    close(output, expected, torch.float32)
    close(lse, expected_lse, torch.float32)


def test_tokens_that_did_not_choose_a_block_do_not_multiply_it():
    """On a CPU each token of a tile skips what it alone does not want."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 40, 64, generator=generator)
    rows = torch.randn(2, 4 * 32, 128, generator=generator)
    rows[:, 64:96] = torch.nan
    chosen = torch.ones(2, 40, 4, dtype=torch.bool)
    chosen[:, :, 2] = torch.rand(2, 40, generator=generator) < 0.5
    output, lse = sparda("cpu").attend_part(query, *rows.split(64, -1), chosen, 0.1, block_size=32)
    given = chosen[:, None, :, 2].expand(-1, 3, -1)
    assert output.isnan().any(-1).equal(given)
    assert lse.isnan().equal(given)


@pytest.mark.parametrize("ours", ["triton"], indirect=True)
def test_parts_refuse_blocks_that_tiles_of_keys_do_not_divide(ours):
    """They would leave out the rest of each block."""
    device = device_of(ours)
    query, keys = torch.ones(1, 1, 4, 16, device=device), torch.ones(1, 192, 16, device=device)
    chosen = torch.ones(1, 4, 2, dtype=torch.bool, device=device)
    with pytest.raises(AssertionError, match="straddle"):
        ours.attend_part(query, keys, keys, chosen, 0.1, block_size=96)


@pytest.mark.usefixtures("small_tiles")
def test_long_lists_of_blocks(ours):
    """More blocks than one tile of the list holds, many per query."""
    device = device_of(ours)
    generator = torch.Generator().manual_seed(0)
    query = noise(2, 3, 40, 64, generator=generator, device=device)
    keys, values = noise(2, 2, 16 * 40, 64, generator=generator, device=device)
    chosen = (torch.rand(2, 40, 50, generator=generator) < 0.1).to(device)
    arguments = query, keys, values, chosen, 0.1
    options = {"first_position": 16 * 10, "block_size": 16, "past_from": 16 * 45}
    for actual, theirs in zip(
        ours.attend_part(*arguments, **options),
        REFERENCE.attend_part(*arguments, **options),
        strict=True,
    ):
        close(actual, theirs, torch.float32)


def test_a_part_may_be_empty(ours):
    device = device_of(ours)
    query = torch.full((2, 3, 4, 64), torch.nan, device=device)
    keys = torch.empty(2, 0, 64, device=device)
    output, lse = ours.attend_part(query, keys, keys, None, 0.1)
    assert not output.any()
    assert (lse == -torch.inf).all()
    none = query[:, :, :0]
    output, lse = ours.attend_part(none, query[:, 0], query[:, 0], None, 0.1)
    assert output.shape == (2, 3, 0, 64)
    assert lse.shape == (2, 3, 0)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("every", ["reference", "cpu"], indirect=True)
def test_parts_of_attention_merge_to_the_whole(every, group):
    device = device_of(every)
    generator = torch.Generator().manual_seed(group)
    kv_heads, tokens, past, dim = 2, 9, 37, 16
    query = torch.randn(kv_heads, group, tokens, dim, generator=generator).to(device)
    rows = torch.randn(kv_heads, past + tokens, 2 * dim, generator=generator).to(
        device
    )  # strided halves
    keys, values = rows.split(dim, -1)
    mask = torch.rand(kv_heads, tokens, past, generator=generator).to(device) < 0.5
    mask[0, 3] = mask[1, :, :20] = False  # a token and a head that see nothing in a part
    logits = query @ keys.transpose(1, 2).unsqueeze(1) * 0.3
    causal = (
        torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().expand(kv_heads, -1, -1)
    )
    hidden = ~torch.cat((mask, causal), -1).unsqueeze(1)
    expected = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ values.unsqueeze(1)

    parts = [
        every.attend_part(
            query, keys[:, a:b], values[:, a:b], mask, 0.3, first_position=a, block_size=1
        )
        for a, b in ((0, 20), (20, past))
    ]
    own = every.attend_part(query, keys[:, past:], values[:, past:], None, 0.3, past_from=0)
    result = merge_parts(*merge_parts(*parts[0], *parts[1]), *own)
    torch.testing.assert_close(result[0], expected, atol=1e-6, rtol=1e-5)

    dense = every.attend_part(query, keys[:, :past], values[:, :past], None, 0.3)
    expected = torch.softmax(logits[..., :past], -1) @ values[:, :past].unsqueeze(1)
    torch.testing.assert_close(dense[0], expected, atol=1e-6, rtol=1e-5)
