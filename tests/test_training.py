# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Forecast trainer: its loss against a naive float64 one, resumption, files and errors."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from vllm_sparse.cli import main
from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.policies.sparda import compress_keys, num_windows, select_blocks
from vllm_sparse.training.backbone import Backbone
from vllm_sparse.training.data import pack, read_documents, sequence_index
from vllm_sparse.training.evaluate import Evaluation
from vllm_sparse.training.files import export_forecast, load_forecast, load_tensors
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.geometry import Geometry
from vllm_sparse.training.objective import (
    LiveTeacher,
    StoredTeacher,
    best_free_blocks,
    forecast_loss,
    pooled,
)
from vllm_sparse.training.samples import CachedSource, SampleSource, sample_positions
from vllm_sparse.training.settings import TrainSettings, load_train_settings, recipe_names
from vllm_sparse.training.trainer import (
    Interrupted,
    OutOfMemoryError,
    Trainer,
    checkpoints,
    read_checkpoint,
)

GEOMETRY = Geometry(block_size=32, kernel_stride=8, init_blocks=1, local_blocks=1, top_k=5)
TOKENS = 300
SETTINGS = {
    "block_size": 32,
    "kernel_stride": 8,
    "local_blocks": 1,
    "top_k": 5,
    "seq_len": 256,
    "batch_size": 2,
    "steps": 4,
    "lr": 5e-3,
    "dtype": "float32",
}


def config(kind=LlamaConfig, **changes):
    """A model of three layers, 4 query and 2 KV heads of size 16."""
    values = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        # Peaked attention, or there is nothing to learn.
        "initializer_range": 0.2,
        **changes,
    }
    return kind(**values)


def backbone(kind=(LlamaConfig, LlamaModel), seed=0, **changes):
    """A frozen random model."""
    torch.manual_seed(seed)
    return Backbone(kind[1](config(kind[0], **changes)), "tiny")


def sequences(count=5, tokens=256):
    """Random token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 64, (count, tokens), generator=generator, dtype=torch.int32)


def layer(seed=0, heads=4, kv_heads=2, dim=16, tokens=TOKENS):
    """Random queries, keys and a Forecast of one layer."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(heads, tokens, dim, generator=generator)
    keys = torch.randn(kv_heads, tokens, dim, generator=generator)
    forecast = 2 * torch.randn(kv_heads, tokens, dim, generator=generator)
    return query, keys, forecast


# A second implementation: one row and one head at a time, float64, from the specification.


def naive_teacher(kind, query, keys, row, head, sizes):
    """Distribution over windows, or over blocks for ``block-mass``."""
    group = query.shape[0] // keys.shape[0]
    tokens, dim = keys.shape[1:]
    stride, size = sizes.kernel_stride, 2 * sizes.kernel_stride
    windows = (tokens - size) // stride + 1
    total = None
    for member in range(group):
        vector = query[head * group + member, row]
        if kind == "fine":
            count = min(row + 1, tokens - 1)
            means = torch.stack([(keys[head, j] + keys[head, j + 1]) / 2 for j in range(count)])
        elif kind == "query":
            count = max(0, (row + 1 - size) // stride + 1)
            if not count:
                return torch.zeros(windows, dtype=torch.float64)
            starts = range(0, count * stride, stride)
            means = torch.stack([keys[head, j : j + size].mean(0) for j in starts])
        else:
            count, means = row + 1, keys[head, : row + 1]
        weights = torch.softmax(means @ vector / math.sqrt(dim), 0)
        total = weights if total is None else total + weights
    if kind == "fine":
        result = torch.zeros(windows, dtype=torch.float64)
        for window in range(windows):
            near = range(max(0, window * stride - 1), window * stride + stride)
            near = [j for j in near if j < len(total)]
            if near:
                result[window] = total[near].max()
    elif kind == "query":
        result = torch.zeros(windows, dtype=torch.float64)
        result[:count] = total
    else:
        result = torch.zeros(-(-tokens // sizes.block_size), dtype=torch.float64)
        for block in range(len(result)):
            result[block] = total[block * sizes.block_size : (block + 1) * sizes.block_size].sum()
    return result / (result.sum() + 1e-8)


def naive_row(kind, supervision, query, keys, forecast, row, head, sizes):
    """KL divergence of one row."""
    tokens, dim = keys.shape[1:]
    stride, per_block = sizes.kernel_stride, sizes.windows_per_block
    target = naive_teacher(kind, query, keys, row, head, sizes)
    windows = num_windows(tokens, 2 * stride, stride)
    logits = []
    for window in range(windows):
        mean = keys[head, window * stride : (window + 2) * stride].mean(0)
        seen = stride * window <= row
        logits.append((forecast @ mean) / math.sqrt(dim) if seen else torch.tensor(-math.inf))
    logits = torch.stack([value.double() for value in logits])
    blocks = -(-tokens // sizes.block_size)

    def best(values, block):
        near = [w for w in range(block * per_block - 1, (block + 1) * per_block) if w >= 0]
        near = [w for w in near if w < windows]
        return max((values[w] for w in near), default=torch.tensor(-math.inf))

    own = row // sizes.block_size
    free = [b for b in range(blocks) if sizes.init_blocks <= b < own - sizes.local_blocks]
    if kind == "block-mass":
        logits = torch.stack([best(logits, block).double() for block in range(blocks)])
        rank = {block: target[block] for block in free}
    else:
        rank = {block: best(target, block) for block in free}
    chosen = free
    if supervision == "selected":
        chosen = sorted(free, key=lambda block: (-rank[block], block))[: sizes.free_picks]
    columns = chosen
    if kind != "block-mass":
        columns = [w for b in chosen for w in range(b * per_block, (b + 1) * per_block)]
        columns = [w for w in columns if w < windows]
    if supervision == "free":
        if not columns or target[columns].sum() == 0:
            return torch.zeros((), dtype=torch.float64)
        wanted = target[columns] / target[columns].sum()
        given = torch.log_softmax(logits[columns], 0)
        return sum(t * (t.log() - g) for t, g in zip(wanted, given, strict=True) if t > 0)
    student = torch.softmax(logits, 0)

    def reduced(values):
        rest = (values.sum() - values[columns].sum()).clamp_min(1e-8).reshape(1)
        joined = torch.cat((values[columns].clamp_min(1e-8), rest))
        return joined / joined.sum()

    wanted, given = reduced(target), reduced(student)
    return (wanted * (wanted.log() - given.log())).sum()


KINDS = [
    pytest.param(kind, supervision, id=f"{kind}-{supervision}")
    for kind in ("fine", "query", "block-mass")
    for supervision in ("selected", "free")
]


@pytest.mark.parametrize(("kind", "supervision"), KINDS)
def test_loss_and_gradient_equal_a_naive_implementation(kind, supervision):
    query, keys, forecast = layer()
    positions = torch.tensor([3, 40, 131, 200, 263, 299])
    forecast = forecast[:, positions].requires_grad_()
    teacher = LiveTeacher(kind, query[:, positions], keys, positions, GEOMETRY)
    compressed = compress_keys(keys, 16, 8)
    loss = forecast_loss(
        forecast, teacher, compressed, positions, TOKENS, GEOMETRY, supervision, chunk=4
    )
    (gradient,) = torch.autograd.grad(loss, forecast)

    exact = forecast.detach().double().requires_grad_()
    rows = [
        naive_row(
            kind, supervision, query.double(), keys.double(), exact[head, i], row, head, GEOMETRY
        )
        for head in range(2)
        for i, row in enumerate(positions.tolist())
    ]
    expected = torch.stack(rows).mean()
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert expected > 0.01
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("kind", "supervision"), KINDS)
def test_chunk_size_does_not_matter(kind, supervision):
    query, keys, forecast = layer(1)
    positions = torch.arange(TOKENS)
    compressed = compress_keys(keys, 16, 8)
    results = []
    for chunk in (None, 1, 7, 64):
        leaf = forecast.clone().requires_grad_()
        teacher = LiveTeacher(kind, query, keys, positions, GEOMETRY)
        loss = forecast_loss(
            leaf, teacher, compressed, positions, TOKENS, GEOMETRY, supervision, chunk
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-8)


def test_stored_teacher_gives_what_the_live_one_gave():
    query, keys, forecast = layer(2)
    positions = torch.arange(100, TOKENS, 3)
    live = LiveTeacher("block-mass", query[:, positions], keys, positions, GEOMETRY)
    stored = StoredTeacher(
        torch.cat([live.rows(0, 32), live.rows(32, len(positions))], 1), per_block=True
    )
    compressed = compress_keys(keys, 16, 8)
    forecast = forecast[:, positions]
    arguments = (compressed, positions, TOKENS, GEOMETRY, "free", 32)
    torch.testing.assert_close(
        forecast_loss(forecast, live, *arguments), forecast_loss(forecast, stored, *arguments)
    )


def test_supervised_and_forced_blocks_are_those_of_the_policy():
    query, keys, _ = layer(3)
    positions = torch.arange(TOKENS)
    scores = LiveTeacher("query", query, keys, positions, GEOMETRY).rows(0, TOKENS)
    free = best_free_blocks(pooled(scores, TOKENS, GEOMETRY), positions, GEOMETRY)
    blocks = torch.arange(GEOMETRY.num_blocks(TOKENS))
    visible = blocks <= (positions // 32).unsqueeze(-1)
    mine = free | (~GEOMETRY.free(positions, len(blocks)) & visible)
    policy = select_blocks(
        scores,
        positions,
        block_size=32,
        init_blocks=1,
        local_blocks=1,
        top_k=5,
        kernel_stride=8,
    )
    expected = torch.zeros_like(mine, dtype=torch.int32)
    expected.scatter_add_(-1, policy.clamp_min(0), (policy >= 0).int())
    assert torch.equal(mine, expected.bool())


def test_rows_without_a_choice_cost_nothing():
    query, keys, forecast = layer(4)
    positions = torch.arange(32)
    teacher = LiveTeacher("fine", query[:, positions], keys, positions, GEOMETRY)
    for supervision in ("selected", "free"):
        leaf = forecast[:, positions].clone().requires_grad_()
        loss = forecast_loss(
            leaf, teacher, compress_keys(keys, 16, 8), positions, TOKENS, GEOMETRY, supervision
        )
        loss.backward()
        assert loss.abs() < 1e-6
        assert leaf.grad.isfinite().all()


MODELS = [
    pytest.param((LlamaConfig, LlamaModel), id="llama"),
    pytest.param((MistralConfig, MistralModel), id="mistral"),
    pytest.param((Qwen2Config, Qwen2Model), id="qwen2"),
    pytest.param((Qwen3Config, Qwen3Model), id="qwen3"),
]


@pytest.mark.parametrize("kind", MODELS)
def test_tap_leaves_the_model_unchanged_and_sees_its_attention(kind):
    changes = {"sliding_window": None} if kind[0] is MistralConfig else {}
    torch.manual_seed(0)
    model = kind[1](config(kind[0], **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    tokens = sequences(1, 96)[0].long()
    with torch.no_grad():
        expected = model(tokens[None], use_cache=False).last_hidden_state
        tapped = Backbone(model, "tiny")
        tapped.check_rope()
        after = model(tokens[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(after, expected)
    views = []
    tapped.run(tokens, views.append)
    assert [view.layer for view in views] == [0, 1, 2]
    for view in views:
        again = tapped.project_query(view.layer, view.inputs, view.cos, view.sin)
        torch.testing.assert_close(again, view.query)
        assert view.keys.shape == (2, 96, 16)


def test_lookahead_start_is_the_group_mean_of_the_next_query():
    frozen = backbone((Qwen2Config, Qwen2Model))
    for layer_index in range(3):
        torch.nn.init.normal_(frozen.projection(layer_index, "q_proj").bias)
    views = []
    frozen.run(sequences()[0], views.append)
    forecast = Forecast(3, 64, 2, 16, bias=True)
    forecast.initialise("lookahead", frozen, 0)
    for view, source in ((views[0], views[0]), (views[1], views[0]), (views[2], views[1])):
        query = frozen.project_query(view.layer, source.inputs, view.cos, view.sin)
        mine = forecast(view.layer, source.inputs, view.cos, view.sin)
        torch.testing.assert_close(mine, query.unflatten(0, (2, 2)).mean(1))


def test_lookahead_start_without_a_bias_has_it_folded_in():
    torch.manual_seed(0)
    model = Qwen2Model(config(Qwen2Config))
    # As in trained models, every hidden state has much in common.
    model.embed_tokens.weight.data += 20 * torch.randn(64)
    frozen = Backbone(model, "tiny")
    for layer_index in range(3):
        torch.nn.init.normal_(frozen.projection(layer_index, "q_proj").bias, std=5)
    text, other = sequences()[:2]
    views = []
    frozen.run(other, views.append)
    errors = []
    for start in (None, text):
        forecast = Forecast(3, 64, 2, 16)
        forecast.initialise("lookahead", frozen, 0, start)
        query = frozen.project_query(1, views[0].inputs, views[1].cos, views[1].sin)
        mine = forecast(1, views[0].inputs, views[1].cos, views[1].sin)
        errors.append((mine - query.unflatten(0, (2, 2)).mean(1)).norm() / query.norm())
    assert errors[1] < 0.1 * errors[0]


def test_uniform_start_is_bounded_and_seeded():
    weights = []
    for seed in (0, 0, 1):
        forecast = Forecast(3, 64, 2, 16)
        forecast.initialise("uniform", backbone(), seed)
        weights.append(forecast.projections[1].weight.detach())
    assert weights[0].abs().max() <= 1 / 8
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_sparse_forward_is_dense_when_everything_is_read():
    frozen = backbone()
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


def test_minicpm_is_loaded_as_the_llama_that_it_equals(tmp_path):
    torch.manual_seed(0)
    model = LlamaModel(config())
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values.update(model_type="minicpm", scale_emb=12, scale_depth=1.4)
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = Backbone.load(str(tmp_path), "float32")
    assert loaded.name == tmp_path.name
    views = []
    tokens = sequences(1, 40)[0].long()
    loaded.run(tokens, views.append)
    hidden = 12 * model.embed_tokens(tokens[None])
    tables = model.rotary_emb(hidden, torch.arange(40)[None])
    first = model.layers[0]
    with torch.no_grad():
        seen = first.input_layernorm(hidden)
        torch.testing.assert_close(views[0].inputs, seen[0])
        mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
        attended, _ = first.self_attn(seen, position_embeddings=tables, attention_mask=mask)
        hidden = hidden + attended * (1.4 / math.sqrt(3))
        grown = first.mlp(first.post_attention_layernorm(hidden))
        hidden = hidden + grown * (1.4 / math.sqrt(3))
        torch.testing.assert_close(views[1].inputs, model.layers[1].input_layernorm(hidden)[0])


def trainer(folder, data=None, kind=(LlamaConfig, LlamaModel), cache=None, **changes):
    """A trainer on a tiny model."""
    settings = TrainSettings(**{**SETTINGS, **changes})
    frozen = backbone(kind)
    source = SampleSource(
        frozen,
        settings.geometry,
        settings.teacher,
        settings.queries,
        settings.tail_queries,
        settings.sparse_forward,
        settings.chunk,
        settings.seed,
    )
    if cache:
        source = CachedSource(source, cache)
    forecast = Forecast(3, 64, 2, 16, settings.bias)
    forecast.initialise(settings.init, frozen, settings.seed)
    tokens = sequences() if data is None else data
    return Trainer(settings, frozen, forecast, source, tokens, folder)


def weights(run):
    """All weights, flat."""
    return torch.cat([parameter.detach().flatten() for parameter in run.forecast.parameters()])


@pytest.mark.parametrize(("kind", "supervision"), KINDS)
def test_loss_falls(tmp_path, kind, supervision):
    run = trainer(
        tmp_path,
        sequences(2),
        teacher=kind,
        supervision=supervision,
        init="uniform",
        steps=12,
        lr=1e-2,
    )
    losses = [entry.loss for entry in run.train()]
    assert losses[-1] < 0.9 * losses[0]
    assert run.step == 12


def test_every_projection_gets_a_gradient_from_its_own_layer(tmp_path):
    run = trainer(tmp_path, bias=True)
    before = [parameter.detach().clone() for parameter in run.forecast.parameters()]
    next(run.train())
    for old, new in zip(before, run.forecast.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, cached):
    options = {"steps": 6, "queries": 64, "tail_queries": 8, "save_every": 2, "keep": 9}
    whole = trainer(tmp_path / "whole", **options)
    losses = [entry.loss for entry in whole.train()]
    first = trainer(tmp_path / "parts", cache=tmp_path / "cache" if cached else None, **options)
    for entry in first.train():
        if entry.step == 5:
            break
    second = trainer(tmp_path / "parts", cache=tmp_path / "cache" if cached else None, **options)
    second.resume(checkpoints(tmp_path / "parts")[-1])
    assert second.step == 4
    rest = [entry.loss for entry in second.train()]
    assert rest == losses[4:]
    assert torch.equal(weights(second), weights(whole))
    with (tmp_path / "parts" / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]


def test_interrupt_saves_the_last_complete_step(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    whole = trainer(tmp_path / "whole", steps=4)
    list(whole.train())
    run = trainer(tmp_path / "parts", steps=4)
    steps = run.train()
    next(steps)
    next(steps)
    # In the middle of the third step.
    original = run._backward
    run._backward = lambda *arguments: (
        os.kill(os.getpid(), signal.SIGINT),
        original(*arguments),
    )
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted):
        next(steps)
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-000002.pt"]
    assert signal.getsignal(signal.SIGINT) is before
    again = trainer(tmp_path / "parts", steps=4)
    again.resume(checkpoints(tmp_path / "parts")[-1])
    list(again.train())
    assert torch.equal(weights(again), weights(whole))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    list(trainer(tmp_path, steps=4, save_every=1, keep=2).train())
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-000003.pt",
        "checkpoint-000004.pt",
    ]
    assert not list(tmp_path.glob(".*"))
    assert read_checkpoint(checkpoints(tmp_path)[-1])["step"] == 4


def test_resume_refuses_what_does_not_fit(tmp_path):
    list(trainer(tmp_path, steps=1).train())
    saved = checkpoints(tmp_path)[-1]
    with pytest.raises(ConfigError, match="another base model"):
        trainer(tmp_path, kind=(Qwen2Config, Qwen2Model)).resume(saved)
    with pytest.raises(ConfigError, match=r"do not fit.*bias"):
        trainer(tmp_path, bias=True).resume(saved)
    with pytest.raises(ConfigError, match=r"other settings.*lr 0\.005 -> 0\.1"):
        trainer(tmp_path, lr=0.1).resume(saved)
    with pytest.raises(ConfigError, match="--data"):
        trainer(tmp_path, sequences(3)).resume(saved)
    saved.write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        trainer(tmp_path).resume(saved)


def test_out_of_memory_comes_with_advice(tmp_path):
    run = trainer(tmp_path)

    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run._backward = exhausted
    with pytest.raises(OutOfMemoryError, match=r"--chunk.*--queries.*--seq-len"):
        next(run.train())


@pytest.mark.parametrize("bias", [False, True])
def test_exported_file_loads(tmp_path, bias):
    frozen = backbone((Qwen2Config, Qwen2Model))
    forecast = Forecast(3, 64, 2, 16, bias)
    forecast.initialise("lookahead", frozen, 0)
    path = tmp_path / "forecast.safetensors"
    export_forecast(path, forecast, GEOMETRY, "some/model")
    tensors, metadata = load_tensors(path)
    names = {
        "model.layers.0.self_attn.q_curr_proj",
        "model.layers.0.self_attn.q_future_proj",
        "model.layers.1.self_attn.q_future_proj",
    }
    kinds = ("weight", "bias") if bias else ("weight",)
    assert set(tensors) == {f"{name}.{kind}" for name in names for kind in kinds}
    assert tensors["model.layers.1.self_attn.q_future_proj.weight"].shape == (32, 64)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert metadata == {
        "base_model": "some/model",
        "block_size": "32",
        "kernel_size": "16",
        "kernel_stride": "8",
        "init_blocks": "1",
        "local_blocks": "1",
        "top_k": "5",
        "version": "1",
    }
    loaded, geometry, _ = load_forecast(path, 16)
    assert geometry == GEOMETRY
    for old, new in zip(forecast.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(old.bfloat16().float(), new)


def test_files_that_are_no_forecast_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match="not a readable"):
        load_forecast(path, 16)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a readable"):
        load_forecast(path, 16)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="lacks block_size"):
        load_forecast(path, 16)
    export_forecast(path, Forecast(3, 64, 2, 16), GEOMETRY, "m")
    with pytest.raises(ConfigError, match="another model"):
        load_forecast(path, 24)


def test_evaluation_ranks_the_selectors():
    frozen = backbone()
    forecast = Forecast(3, 64, 2, 16)
    forecast.initialise("uniform", frozen, 0)
    report = Evaluation(frozen, GEOMETRY, forecast, queries=0, chunk=50).run(sequences(2))
    assert report.queries == 2 * (256 - 6 * 32)
    recall = {name: values["recall"] for name, values in report.summary().items()}
    assert recall["exact"] == 1
    assert recall["query"] > recall["random"] + 0.1
    # The first layer's look-ahead is its own query.
    torch.testing.assert_close(report.recall["lookahead-query"][0], report.recall["query"][0])
    assert report.mass["exact"].ge(report.mass["query"] - 1e-9).all()
    assert len(report.table().splitlines()) == 3 + 4
    json.dumps(report.as_dict())


def test_sampled_rows():
    rows = sample_positions(256, 64, 8, 160, seed=3)
    assert len(rows) == len(set(rows.tolist())) == 64
    assert rows.min() >= 160
    assert rows[-8:].tolist() == list(range(248, 256))
    assert torch.equal(rows, sample_positions(256, 64, 8, 160, seed=3))
    assert not torch.equal(rows, sample_positions(256, 64, 8, 160, seed=4))
    assert len(sample_positions(256, 500, 8, 160, seed=3)) == 96
    assert torch.equal(sample_positions(9, 0, 0, 0, seed=0), torch.arange(9))


class Words:
    """A tokenizer: words to their lengths."""

    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [len(word) for word in text.split()]}


def test_packing():
    documents = ["a bb ccc", "dddd", [5, 6, 7, 8]]
    joined = pack(documents, Words(), 3)
    assert joined.tolist() == [[1, 2, 3], [0, 4, 0], [5, 6, 7]]
    apart = pack(documents, Words(), 3, "documents")
    assert apart.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert len(pack(documents, Words(), 2, limit=1)) == 1
    with pytest.raises(ConfigError, match="longest document: 4"):
        pack(documents, Words(), 100)


def test_sources(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": [1, 2]}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert list(read_documents([str(tmp_path)])) == ["one", [1, 2], "plain"]
    with pytest.raises(ConfigError, match="line 1: no JSON object with a key 'body'"):
        list(read_documents([str(tmp_path / "a.jsonl")], "body"))
    with pytest.raises(ConfigError, match="no file or folder"):
        list(read_documents(["no/such-dataset"]))


def test_order_of_data_is_a_permutation_of_each_epoch():
    epochs = [[sequence_index(e * 7 + i, 7, 5) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_recipes_are_valid():
    assert recipe_names() == ["dense-small", "sparda"]
    for name in recipe_names():
        load_train_settings(name, {})
    published = load_train_settings("sparda", {})
    assert published == TrainSettings(init="uniform")
    assert published.geometry.free_picks == 62


def test_learning_rate():
    linear = TrainSettings(**{**SETTINGS, "schedule": "linear", "warmup_steps": 2, "lr": 1.0})
    assert [linear.learning_rate(step) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    constant = TrainSettings(**SETTINGS)
    assert {constant.learning_rate(step) for step in range(4)} == {SETTINGS["lr"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 6144}, "too short"),
        ({"top_k": 34}, "leaves nothing to choose"),
        ({"block_size": 48}, "not a multiple"),
        ({"teacher": "mean"}, "teacher"),
        ({"typo": 1}, "typo"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_train_settings(None, changes)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="dense-small, sparda"):
        load_train_settings("sparta", {})


def test_unsupported_models_are_refused():
    with pytest.raises(UnsupportedError, match=r"no decoder with layers\[i\]"):
        Backbone(torch.nn.Linear(2, 2), "linear")
    sliding = config(
        Qwen2Config,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        Backbone(Qwen2Model(sliding), "sliding")
    odd = LlamaModel(config())
    odd.layers[1].self_attn.k_proj = torch.nn.Linear(64, 24)
    with pytest.raises(UnsupportedError, match="layer 1's k_proj gives 24 values"):
        Backbone(odd, "odd")
    with pytest.raises(ConfigError, match="cannot load the model"):
        Backbone.load("/no/such/model")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model with a tokenizer, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    LlamaModel(config()).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


def test_commands(model_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in sequences(4).flatten().tolist()))
    out = tmp_path / "forecast.safetensors"
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**SETTINGS, "steps": 3, "init": "uniform"}.items()
    ]
    command = ["train-forecast", "--model", str(model_folder), "--data", str(text)]
    command += ["--out", str(out), *options]
    assert main(command) == 0
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*command[:-1], "--steps=4", "--init=uniform", "--resume"]) == 0
    assert "step 4 of 4" in capsys.readouterr().out

    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"base_model: {model_folder.name}" in shown
    assert "q_curr_proj.weight" in shown

    numbers = tmp_path / "numbers.json"
    command = ["eval-forecast", "--model", str(model_folder), "--forecast", str(out)]
    command += ["--data", str(text), "--seq-len=256", "--sequences=2", "--dtype=float32"]
    assert main([*command, "--json", str(numbers)]) == 0
    assert "lookahead-query" in capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert found["top_k"] == 5
    assert len(found["recall"]["forecast"]) == 3

    wrong = Forecast(2, 64, 2, 16)
    export_forecast(out, wrong, GEOMETRY, "another/model")
    assert main(command) == 1
    assert "trained for another/model" in capsys.readouterr().err
