# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ page table, copies and attention against their references."""

from __future__ import annotations

import pytest
import torch
from vllm_sparse.kernels.cpu import paging as fused
from vllm_sparse.kernels.cpu import prefill as flash
from vllm_sparse.kernels.reference import paging as reference
from vllm_sparse.kernels.reference import prefill, sparda_steps

from vllm_sparse.policies.attention import attend


def empty_table(pieces: int, frames: int) -> reference.PageTable:
    return reference.PageTable(
        torch.full((pieces,), -1, dtype=torch.int32),
        torch.full((frames,), -1),
        torch.zeros(frames, dtype=torch.int64),
        torch.zeros(frames, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("frames", [12, 13, 40])
def test_resolve_agrees_with_reference_over_many_steps(frames: int) -> None:
    generator = torch.Generator().manual_seed(frames)
    ours, theirs = empty_table(60, frames), empty_table(60, frames)
    for step in range(1, 200):
        wanted = torch.randint(-1, 60, (3, 4), generator=generator)
        a, b = fused.resolve(ours, wanted, step), reference.resolve(theirs, wanted, step)
        for x, y in zip(a[:3], b[:3], strict=True):
            assert x.equal(y)
        assert a.hits == b.hits
        for x, y in zip(ours, theirs, strict=True):
            assert x.equal(y)
        asked = wanted.unique()
        asked = asked[asked >= 0]
        assert ours.piece_of[a.frames[wanted >= 0].long()].equal(wanted[wanted >= 0])
        assert a.hits + len(a.missing) == len(asked)


@pytest.mark.parametrize("module", [fused, reference])
def test_second_chance_spares_recently_used_frames(module) -> None:
    table = empty_table(10, 4)
    module.resolve(table, torch.tensor([0, 1, 2, 3]), 1)
    # The hand is back at frame 0. It clears all marks and takes frame 0 in step 2.
    assert module.resolve(table, torch.tensor([4]), 2).targets.tolist() == [0]
    # Frame 1 (piece 1) is used again, so the hand takes frame 2 next.
    module.resolve(table, torch.tensor([1]), 3)
    assert module.resolve(table, torch.tensor([5]), 4).targets.tolist() == [2]


@pytest.mark.parametrize("module", [fused, reference])
def test_more_pieces_than_frames_is_an_error(module) -> None:
    with pytest.raises(reference.SlabFullError, match="all 3 frames"):
        module.resolve(empty_table(10, 3), torch.arange(4), 1)


@pytest.mark.parametrize("module", [fused, reference])
def test_copy_moves_exactly_the_named_pieces(module) -> None:
    source = torch.randn(6, 4, 2)
    target = torch.full((5, 4, 2), torch.nan)
    module.copy_pieces(target, torch.tensor([4, 0]), source, torch.tensor([1, 5]))
    assert target[4].equal(source[1])
    assert target[0].equal(source[5])
    assert target[1:4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (64, 7), (128, 16), (80, 3), (24, 2)])
def test_attend_frames(dtype: torch.dtype, dim: int, group: int) -> None:
    generator = torch.Generator().manual_seed(dim + group)
    tokens, kv_heads, count, block_size, num_frames = 4, 2, 5, 32, 50
    slab = torch.randn(num_frames, block_size, 2 * dim, generator=generator).to(dtype)
    frames = torch.randperm(num_frames - 10, generator=generator)[: tokens * kv_heads * count]
    frames = frames.view(tokens, kv_heads, count).int()
    lengths = torch.tensor([count * block_size, 0, 70, 1], dtype=torch.int32)
    for t, n in enumerate(lengths.tolist()):  # nothing beyond a row's length may be read
        used = -(-n // block_size)
        if n % block_size:
            slab[frames[t, :, used - 1].long(), n % block_size :] = torch.nan
        slab[frames[t, :, used:].flatten().long()] = torch.nan
        frames[t, :, used:] = -1
    query = torch.randn(tokens, kv_heads * group, dim, generator=generator).to(dtype)
    outputs = []
    for module in (fused, reference):
        output = torch.full_like(query, torch.nan)
        module.attend_frames(slab, query, output, frames, lengths, 0.125)
        outputs.append(output.float())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
    assert outputs[0][1].abs().sum() == 0
    rows = slab[frames[2, :, :3].long()].float().flatten(1, 2)
    index = torch.arange(70).expand(kv_heads, -1)
    expected = attend(query[2].float(), rows[..., :dim], rows[..., dim:], index, 0.125)
    torch.testing.assert_close(outputs[0][2], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("module", [flash, sparda_steps])
@pytest.mark.parametrize("group", [1, 3])
def test_parts_of_attention_merge_to_the_whole(module, group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    kv_heads, tokens, past, dim = 2, 9, 37, 16
    query = torch.randn(kv_heads, group, tokens, dim, generator=generator)
    rows = torch.randn(kv_heads, past + tokens, 2 * dim, generator=generator)  # strided halves
    keys, values = rows.split(dim, -1)
    mask = torch.rand(kv_heads, tokens, past, generator=generator) < 0.5
    mask[0, 3] = mask[1, :, :20] = False  # a token and a head that see nothing in a part
    logits = query @ keys.transpose(1, 2).unsqueeze(1) * 0.3
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(kv_heads, -1, -1)
    hidden = ~torch.cat((mask, causal), -1).unsqueeze(1)
    expected = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ values.unsqueeze(1)

    parts = [
        module.attend_part(
            query, keys[:, a:b], values[:, a:b], mask, False, 0.3, first_position=a, block_size=1
        )
        for a, b in ((0, 20), (20, past))
    ]
    own = module.attend_part(query, keys[:, past:], values[:, past:], None, True, 0.3)
    result = prefill.merge_parts(*prefill.merge_parts(*parts[0], *parts[1]), *own)
    torch.testing.assert_close(result[0], expected, atol=1e-6, rtol=1e-5)

    dense = module.attend_part(query, keys[:, :past], values[:, :past], None, False, 0.3)
    expected = torch.softmax(logits[..., :past], -1) @ values[:, :past].unsqueeze(1)
    torch.testing.assert_close(dense[0], expected, atol=1e-6, rtol=1e-5)
