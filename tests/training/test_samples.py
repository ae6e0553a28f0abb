# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one layer hands to the loss: its rows, and attention to the chosen blocks only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import hf_sparda
from support.training import GEOMETRY, backbone, config, sequences
from transformers import GraniteConfig, GraniteModel, LlamaConfig, LlamaModel

from vllm_sparse.training.backbone import Backbone, LayerView
from vllm_sparse.training.samples import SampleSource, sample_positions


def test_block_mass_is_that_of_the_models_own_attention():
    """Granite scales its logits by a number of its own."""
    torch.manual_seed(0)
    model = GraniteModel(config(GraniteConfig, attention_multiplier=0.01)).eval()
    tokens = sequences()[0].long()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens[None], output_attentions=True, use_cache=False).attentions
    found = []
    source = SampleSource(Backbone(model, "granite"), GEOMETRY, "block-mass")
    source.visit(0, tokens, lambda sample: found.append(sample.teacher.rows(0, 256)))
    for layer, mass in enumerate(found):
        expected = weights[layer][0].unflatten(0, (2, 2)).unflatten(-1, (-1, 32)).mean(1).sum(-1)
        torch.testing.assert_close(mass, expected)


@pytest.mark.parametrize("kind", [(LlamaConfig, LlamaModel), (GraniteConfig, GraniteModel)])
def test_sparse_forward_is_dense_when_everything_is_read(kind):
    frozen = backbone(kind)  # Granite's scale is 1 unless its config says otherwise
    tokens = sequences()[0]
    outputs = []
    for sparse, top_k in ((False, 5), (True, 8), (True, 5)):
        seen = []
        sizes = replace(GEOMETRY, top_k=top_k)
        source = SampleSource(frozen, sizes, "fine", sparse_forward=sparse, chunk=50)
        source.visit(0, tokens, lambda sample, seen=seen: seen.append(sample.inputs))
        outputs.append(seen[2])
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["block-mass", "query"])
def test_sparse_forward_reads_what_the_teacher_ranks_first(kind):
    """Token by token: the forced blocks, and the best of the others."""
    torch.manual_seed(1)
    heads, groups, count, dim, scale = 4, 2, 256, 16, 0.25
    query, keys = 3 * torch.randn(heads, count, dim), torch.randn(groups, count, dim)
    values = torch.randn(groups, count, dim)
    view = LayerView(0, torch.empty(0), query, keys, torch.empty(0), torch.empty(0), scale)
    source = SampleSource(backbone(), GEOMETRY, kind, sparse_forward=True, chunk=50)
    found = source._routed(view, values)
    size, skipped = GEOMETRY.block_size, 0
    compressed = hf_sparda.compressed_keys(keys, GEOMETRY.kernel_stride)
    windows = hf_sparda.window_probabilities(
        query, compressed, torch.arange(count), GEOMETRY.kernel_stride
    )
    for token in range(count):
        own, past = token // size, slice(token + 1)
        free = list(range(GEOMETRY.init_blocks, own - GEOMETRY.local_blocks))
        for group in range(groups):
            mine = query[2 * group : 2 * group + 2, token]
            weights = (mine @ keys[group, past].T * scale).softmax(-1)
            score = [weights[:, m * size : (m + 1) * size].sum().item() for m in range(own + 1)]
            if kind == "query":  # four windows begin in a block, one reaches into it
                ends = [(max(0, 4 * m - 1), 4 * m + 4) for m in range(own + 1)]
                score = [windows[group, token, a:b].max().item() for a, b in ends]
            best = sorted(free, key=score.__getitem__, reverse=True)
            left_out = best[GEOMETRY.free_picks :]
            skipped += len(left_out)
            kept = torch.ones(own + 1, dtype=torch.bool)
            kept[left_out] = False
            mask = kept.repeat_interleave(size)[past]
            weights = weights * mask / (weights * mask).sum(-1, keepdim=True)
            expected = weights @ values[group, past]
            torch.testing.assert_close(found[2 * group : 2 * group + 2, token], expected)
    assert skipped > 0


def test_sampled_rows():
    rows = sample_positions(256, 64, 8, 160, seed=3)
    assert len(rows) == len(set(rows.tolist())) == 64
    assert rows.min() >= 160
    assert rows[-8:].tolist() == list(range(248, 256))
    assert torch.equal(rows, sample_positions(256, 64, 8, 160, seed=3))
    assert not torch.equal(rows, sample_positions(256, 64, 8, 160, seed=4))
    assert len(sample_positions(256, 500, 8, 160, seed=3)) == 96
    assert torch.equal(sample_positions(9, 0, 0, 0, seed=0), torch.arange(9))
