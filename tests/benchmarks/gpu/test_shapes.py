# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Models that need no download."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.gpu import shapes

LLAMA, MINICPM = shapes.LLAMA, shapes.MINICPM


def test_model_folders_have_the_published_sizes(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = shapes.write_config(tmp_path / "m", MINICPM, 4096)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 128, 73448)
    assert config.max_position_embeddings == 4096
    assert LLAMA.kv_bytes_per_token == 131072
    assert MINICPM.kv_bytes_per_token == 32768
    assert LLAMA.step_weight_bytes(1) == pytest.approx(15.01e9, rel=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_stages_at_once_never_see_half_a_checkpoint(tmp_path, monkeypatch, first):
    """Each writes its own; who comes second leaves the first one's."""
    target, seen = tmp_path / "work" / "checkpoint", []

    def save(folder, **sizes):
        assert folder != target
        folder.mkdir()
        (folder / "config.json").write_text(str(sizes["seed"]))
        seen.append(target.exists())
        if not first:  # another stage has finished meanwhile
            target.mkdir()
            (target / "config.json").write_text("another")
            (target / "model").touch()

    monkeypatch.setattr(shapes, "save_random_llama", save)
    for _ in range(2):
        assert shapes.write_checkpoint(target, 3) == target
    assert seen == [False]
    assert (target / "config.json").read_text() == ("3" if first else "another")
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]


def test_prompts_are_reproducible_and_share_what_they_should():
    prompts = shapes.parity_prompts(3)
    assert prompts == shapes.parity_prompts(3) != shapes.parity_prompts(4)
    assert len({len(prompt) for prompt in prompts}) == 6
    assert prompts[0][:1200] == prompts[1][:1200] != prompts[2][:1200]


def test_dummy_weights_get_a_spread():
    import torch

    parts = {"norm": torch.nn.LayerNorm(8), "embed_tokens": torch.nn.Embedding(64, 256)}
    model = torch.nn.ModuleDict({**parts, "proj": torch.nn.Linear(256, 256, bias=False)})
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model))
    found = []
    for seed in (3, 3, 4):
        shapes.randomise(worker, seed)
        found.append(model["proj"].weight.detach().clone())
    assert (model["norm"].weight == 1).all()
    assert float(model["embed_tokens"].weight.detach().std()) == pytest.approx(1.0, rel=0.1)
    assert float(found[0].std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
