# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Taps in real models with stock attention: what is recorded, when, and that nothing else is."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from reference.random_models import save_random_model
from support.tapped import DIM, KV_HEADS, PROMPT_TOKENS, case, prompt, run_tapped

from vllm_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

HEADS = 8
LOOKAHEAD = {"algorithm": "sparda", "selector": "lookahead-query"}


# ---- the reference -------------------------------------------------------------------------------


def reference(path: Path, generated: list[int]) -> tuple[Any, list[torch.Tensor]]:
    """The Hugging Face model and each layer's normalised input for prompt and output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _m, _i, out: inputs.append(out[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt() + generated]))
    return model, inputs


def query_projection(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mean over each group of the queries that a layer would have, before RoPE."""

    def project(x: torch.Tensor) -> torch.Tensor:
        attention = layer.self_attn
        mean = attention.q_proj(x).view(-1, KV_HEADS, HEADS // KV_HEADS, DIM).mean(2)
        norm = getattr(attention, "q_norm", None)
        return mean if norm is None else mean * norm.weight

    return project


@torch.no_grad()
def check(run: dict[str, Any], model: Any, inputs: list, projections: list) -> None:
    """Compare all that was recorded with ``projections[layer][part](inputs[layer])``."""
    last = len(inputs) - 1
    for step, rows in (
        ("prefill", slice(PROMPT_TOKENS)),
        ("decode", slice(PROMPT_TOKENS, PROMPT_TOKENS + 1)),
    ):
        seen = run["seen"][step]
        assert sorted(seen) == list(range(last + 1))
        for layer, found in seen.items():
            for values, of in zip(found, (layer, layer - 1), strict=True):
                if of < 0 or of == last:
                    assert values is None
                    continue
                expected = [project(inputs[of][rows]) for project in projections[of]]
                want = torch.stack([e.view(-1, KV_HEADS, DIM) for e in expected], 1)
                assert values.shape == want.shape
                torch.testing.assert_close(values, want, atol=2e-4, rtol=2e-4)
    assert sorted(run["rotated"]) == list(range(last))
    for positions, values, rotated in run["rotated"].values():
        cos, sin = model.model.rotary_emb(values, positions[None])
        half = torch.cat((-values[..., DIM // 2 :], values[..., : DIM // 2]), -1)
        want = values * cos[0][:, None] + half * sin[0][:, None]
        torch.testing.assert_close(rotated, want, atol=1e-5, rtol=1e-5)


def own_and_next(layers: list, layer: int) -> list:
    ahead = [query_projection(layers[layer + 1])] if layer + 1 < len(layers) else []
    return ([query_projection(layers[0])] if layer == 0 else []) + ahead


def save_forecast(path: Path, layers: int, hidden: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import save_file

    from vllm_sparse.forecast.file import canonical_name

    generator = torch.Generator().manual_seed(6)
    names = [canonical_name(layer, "q_future_proj") for layer in range(layers - 1)]
    names.append(canonical_name(0, "q_curr_proj"))
    weights = {
        name: torch.randn(KV_HEADS * DIM, hidden, generator=generator) * 0.1 for name in names
    }
    save_file(weights, path, {"block_size": "64", "kernel_stride": "16", "top_k": "7"})
    return weights


def learned(weights: dict[str, torch.Tensor], layer: int) -> list:
    names = ["q_curr_proj"] * (layer == 0) + ["q_future_proj"]
    found = [weights.get(f"model.layers.{layer}.self_attn.{name}.weight") for name in names]
    return [lambda x, w=weight: x @ w.T for weight in found if weight is not None]


# ---- engine tests --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        arch: save_random_model(folder / arch, arch, layers=3)
        for arch in ("llama", "qwen2", "qwen3")
    }


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Settings that name a file for three layers, and its weights."""
    path = tmp_path_factory.mktemp("forecast") / "f.safetensors"
    weights = save_forecast(path, 3, 128)
    return {"algorithm": "sparda", "forecast": str(path)}, weights


@pytest.fixture(scope="module")
def runs(models: dict, forecast: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All eager runs, in one process because starting one takes longest."""
    cases = {arch: case(path, LOOKAHEAD, reload=True) for arch, path in models.items()}
    cases["forecast"] = case(models["llama"], forecast[0], reload=True)
    cases["stock"] = case(models["llama"], None)
    cases["dummy"] = case(models["llama"], LOOKAHEAD, load_format="dummy")
    cases["query"] = case(models["llama"], {"algorithm": "sparda", "selector": "query"})
    return run_tapped(tmp_path_factory.mktemp("runs"), cases)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_lookahead_query_records_the_next_layers_mean_query(models, runs, arch):
    run = runs[arch]
    assert run["models"] == [f"Sparda{arch.capitalize()}ForCausalLM"]
    model, inputs = reference(models[arch], run["tokens"])
    layers = model.model.layers
    check(run, model, inputs, [own_and_next(layers, i) for i in range(len(layers))])


def test_a_forecast_file_is_projected(models, forecast, runs):
    run = runs["forecast"]
    model, inputs = reference(models["llama"], run["tokens"])
    check(run, model, inputs, [learned(forecast[1], i) for i in range(3)])
    assert "trained with other numbers of blocks: top_k 7 (here 96)" in runs["log"]


def test_stock_tokens_stay(runs):
    assert runs["stock"]["models"] == ["LlamaForCausalLM"]
    assert runs["stock"]["tokens"] == runs["llama"]["tokens"] == runs["forecast"]["tokens"]


def test_selectors_that_do_not_look_ahead_stay_stock(runs):
    assert runs["query"]["models"] == ["LlamaForCausalLM"]
    assert runs["query"]["weights"] == [[]]
    assert runs["query"]["tokens"] == runs["stock"]["tokens"]


def test_dummy_weights_are_tapped_too(runs):
    (weights,) = runs["dummy"]["weights"]
    assert [len(weight) for weight in weights] == [2 * KV_HEADS * DIM, KV_HEADS * DIM]
    assert all(weight.isfinite().all() and weight.abs().max() > 0 for weight in weights)


@pytest.mark.parametrize(("arch", "factor"), [("llama", 4), ("qwen2", 4), ("qwen3", 8)])
def test_new_weights_of_a_served_model_reach_its_taps(runs, arch, factor):
    """Queries times four, and norms, which come after them, times two; all numbers stay exact."""
    (before,), (after,) = runs[arch]["weights"], runs[arch]["reloaded"]
    assert len(before) == len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old * factor)
    assert "ForecastTap: Failed to load weights" not in runs["log"]


def test_new_weights_that_pass_by_the_taps_are_refused(runs):
    (why,) = runs["llama"]["refused"]
    assert "in the format of a checkpoint" in why
    assert runs["forecast"]["refused"] == [""], "a file's weights stay whatever the model's are"


@pytest.mark.slow
def test_compiled_taps_are_recorded_before_attention(tmp_path):
    """Six layers, so that taps share memory; snapshots are taken inside the attention op."""
    path = save_random_model(tmp_path / "model", "llama", layers=6)
    weights = save_forecast(tmp_path / "f.safetensors", 6, 128)
    settings = {"algorithm": "sparda", "forecast": str(tmp_path / "f.safetensors")}
    compiled = {"run": case(path, settings)}
    run = run_tapped(tmp_path / "run", compiled, enforce_eager=False)["run"]
    stock = run_tapped(tmp_path / "stock", {"stock": case(path, None)})["stock"]
    model, inputs = reference(path, stock["tokens"])
    check(run, model, inputs, [learned(weights, i) for i in range(6)])
    assert run["tokens"] == stock["tokens"]


@pytest.mark.slow
def test_spawned_workers_build_the_tapped_class(models, runs, tmp_path):
    cases = {"run": case(models["llama"], LOOKAHEAD)}
    run = run_tapped(tmp_path, cases, in_process=False)["run"]
    assert run["models"] == ["SpardaLlamaForCausalLM"]
    for weight, same in zip(run["weights"][0], runs["llama"]["weights"][0], strict=True):
        assert torch.equal(weight, same)
    assert run["tokens"] == runs["stock"]["tokens"]


# ---- without an engine ---------------------------------------------------------------------------


def _layers(**changes: Any) -> list:
    from vllm_sparse.forecast.tapped import _Layer

    rotary = object()
    linear = {
        "total_num_kv_heads": KV_HEADS,
        "num_heads": HEADS,
        "head_size": DIM,
        "input_size": 16,
        "tp_size": 1,
    }
    first = SimpleNamespace(qkv_proj=SimpleNamespace(**linear), rotary_emb=rotary)
    other = SimpleNamespace(
        qkv_proj=SimpleNamespace(**{**linear, **changes}),
        rotary_emb=changes.get("rotary", rotary),
    )
    return [_Layer(first, 0), _Layer(other, 1)]


def test_layers_that_cannot_be_tapped_are_refused():
    from vllm_sparse.forecast.tapped import _check_uniform, _query_norm, _query_rows

    _check_uniform(_layers(), "Model")
    for changes, message in (
        ({"head_size": 64}, r"Model cannot look a layer ahead: head_size differs.*\[32, 64\]"),
        ({"rotary": object()}, "different rotary embeddings.*selector query or previous"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            _check_uniform(_layers(**changes), "Model")
    layers = _layers()
    packed = SimpleNamespace(
        num_heads=HEADS,
        head_size=DIM,
        output_size_per_partition=384,
        input_size=16,
        prefix="model.layers.0.self_attn.qkv_proj",
        bias=None,
    )
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.qkv_proj has no weight"):
        _query_rows(packed)
    packed.weight = torch.zeros(384, 16, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match=r"float8_e4m3fn weight.*it is quantised"):
        _query_rows(packed)
    packed.weight = torch.zeros(384, 16)
    assert _query_rows(packed)[0].shape == (HEADS * DIM, 16)
    layers[1].attention.q_norm = torch.nn.LayerNorm(DIM)
    with pytest.raises(UnsupportedError, match="query norm LayerNorm of layer 1"):
        _query_norm(layers[1])


@pytest.mark.parametrize(
    ("metadata", "warned"),
    [
        ({"base_model": "any/Model-A"}, ""),
        ({"base_model": "/b/model-a/"}, ""),
        ({"base_model": "model-b"}, "but was trained for model-b"),
        ({"base_model": "model-a", "trained_sparse_forward": "False"}, "trained on dense prompts"),
    ],
)
def test_it_is_said_what_a_forecast_was_trained_for(monkeypatch, metadata, warned):
    from vllm_sparse.forecast import tapped
    from vllm_sparse.policies.sparda import SpardaSettings

    said = {"info": [], "warning": []}
    logger = SimpleNamespace(**{level: partial(log, lines) for level, lines in said.items()})
    weights = SimpleNamespace(metadata=metadata, unused=())
    monkeypatch.setattr(tapped, "logger", logger)
    monkeypatch.setattr(tapped, "load_forecast", lambda *arguments: weights)
    (layer, _) = _layers()
    settings = SpardaSettings(forecast="f", sparse_prefill=True)
    tapped._load_learned(settings, layer.linear, 2, "hub/Model-A")
    assert said["info"] == [f"Forecast f, trained for {metadata['base_model']}"]
    assert [warned in line for line in said["warning"]] == [True] * bool(warned)


def log(lines: list[str], message: str, *arguments: Any) -> None:
    lines.append(message % arguments)


@pytest.mark.parametrize("broken", ["qkv_proj", "rotary_emb", "attn"])
def test_attention_of_another_shape_is_refused(broken):
    from vllm.model_executor.layers.attention import Attention

    from vllm_sparse.forecast.tapped import _attention_layers

    class Odd(torch.nn.Module):
        pass

    attn = Attention.__new__(Attention)
    torch.nn.Module.__init__(attn)
    attn.layer_name = "model.layers.0.self_attn.attn"
    model, attention = Odd(), Odd()
    model.self_attn = attention
    parts = {"qkv_proj": torch.nn.Linear(1, 1), "rotary_emb": torch.nn.Identity(), "attn": attn}
    for name, module in parts.items():
        setattr(attention, f"my_{name}" if name == broken else name, module)
    compilation = SimpleNamespace(static_forward_context={attn.layer_name: attn})
    with pytest.raises(UnsupportedError, match=rf"Odd cannot look a layer ahead.*{broken}"):
        _attention_layers(model, SimpleNamespace(compilation_config=compilation))
