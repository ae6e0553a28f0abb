# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Taps in real models with stock attention: what is recorded, when, and that nothing else changes.

Run as a script, this file runs engines (:func:`run_tapped`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPT_TOKENS, NEW_TOKENS, HEADS, KV_HEADS, DIM = 150, 6, 8, 2, 32
LOOKAHEAD = {"algorithm": "sparda", "selector": "lookahead-query"}


# ---- the engine ----------------------------------------------------------------------------------


def case(model: Path, settings: dict[str, Any] | None, **llm: Any) -> dict[str, Any]:
    """One engine: model, settings of SPARDA (None: all stock), arguments of ``LLM``."""
    return {"model": str(model), "settings": settings, "llm": llm}


def run_tapped(
    folder: Path, cases: dict[str, Any], *, enforce_eager: bool = True, in_process: bool = True
) -> dict[str, Any]:
    """Serve one prompt greedily with stock attention, in one engine after the other.

    Args:
        folder: For files.
        cases: From :func:`case`, by name; those with settings are routed and tapped.
        enforce_eager: Off: compiled, from an empty cache.
        in_process: Engine and worker in one process; else no snapshots are taken.

    Returns:
        ``log`` and by case: ``tokens``, ``models`` (class of each worker), ``weights`` (of each
        worker's taps), and ``seen``: per pass ("prefill" and "decode") and layer, what that layer's
        attention found in its own tap and in the one before. ``rotated``: by layer, random values
        and their rotation.
    """
    folder.mkdir(exist_ok=True)
    job, result = folder / "job.json", folder / "result.pt"
    content = {"cases": cases, "enforce_eager": enforce_eager, "in_process": in_process}
    job.write_text(json.dumps({**content, "result": str(result)}))
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    if enforce_eager:
        env["VLLM_CPU_CI_ENV"] = "1"
    else:
        env.pop("VLLM_CPU_CI_ENV", None)
        env["VLLM_CACHE_ROOT"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, __file__, str(job)],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"engine failed:\n{log[-6000:]}")
    return {**torch.load(result), "log": log}


def prompt() -> list[int]:
    return torch.randint(
        1024, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(3)
    ).tolist()


def _model_class(worker: Any) -> str:
    return type(worker.model_runner.model).__name__


def _tap_weights(worker: Any) -> list[torch.Tensor]:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    taps = [getattr(layer, "sparda_tap", None) for layer in layers]
    return [tap.weight.clone() for tap in taps if tap is not None]


def _serve(case: dict[str, Any], enforce_eager: bool, in_process: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    import vllm_sparse.startup as guard
    from vllm_sparse.forecast.routing import route_model

    arguments = {
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 32 << 20,
        "max_num_seqs": 4,
        **case["llm"],
    }
    if case["settings"] is None:
        guard.check_config = lambda config: None
    else:  # as if SPARDA were chosen, whose attention is not tested here
        guard.check_config = lambda config: config.model_config and route_model(config)
        arguments["additional_config"] = {"vllm_sparse": case["settings"]}
    seen: dict[str, dict] = {"prefill": {}, "decode": {}}
    layers: dict[int, Any] = {}
    stock = CPUAttentionBackendImpl.forward

    def forward(self, layer, query, *args, **kwargs):
        index = int(layer.layer_name.split(".")[2])
        step = {PROMPT_TOKENS: "prefill", 1: "decode"}.get(query.shape[0])
        if layers and step and index not in seen[step]:
            taps = [getattr(layers.get(i), "sparda_tap", None) for i in (index, index - 1)]
            seen[step][index] = [
                None if tap is None else tap.values[: query.shape[0]].clone() for tap in taps
            ]
        return stock(self, layer, query, *args, **kwargs)

    CPUAttentionBackendImpl.forward = forward
    try:
        llm = LLM(
            model=case["model"],
            skip_tokenizer_init=True,
            dtype="float32",
            seed=0,
            enforce_eager=enforce_eager,
            **arguments,
        )
        rotated = {}
        if in_process:
            context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            layers.update((int(name.split(".")[2]), layer) for name, layer in context.items())
            generator = torch.Generator().manual_seed(4)
            positions = torch.randint(500, (9,), generator=generator)
            for index, layer in layers.items():
                tap = getattr(layer, "sparda_tap", None)
                if tap is not None:
                    values = torch.randn(9, KV_HEADS, DIM, generator=generator)
                    before = values.clone()
                    rotated[index] = positions, values, tap.rotate(positions, values)
                    assert torch.equal(values, before)
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False
        )
        output = llm.generate([{"prompt_token_ids": prompt()}], sampling, use_tqdm=False)[0]
        return {
            "tokens": list(output.outputs[0].token_ids),
            "seen": seen,
            "rotated": rotated,
            "models": llm.collective_rpc(_model_class),
            "weights": llm.collective_rpc(_tap_weights),
        }
    finally:
        CPUAttentionBackendImpl.forward = stock
        if in_process:
            cleanup_dist_env_and_memory()


def _main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    results = {
        name: _serve(case, job["enforce_eager"], job["in_process"])
        for name, case in job["cases"].items()
    }
    torch.save(results, job["result"])


# ---- the reference -------------------------------------------------------------------------------


def save_model(path: Path, arch: str, layers: int = 3) -> Path:
    from reference.hf_rocketkv import save_random_llama

    if arch != "qwen3":
        return save_random_llama(path, arch=arch, layers=layers)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            # Wide enough to show if the query norm's weight were left out.
            parameter.copy_(1.0 + (5 * noise if "q_norm" in name else noise))
            if "norm" not in name:
                parameter.copy_(noise)
    model.to(torch.float32).save_pretrained(path)
    return path


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

    from vllm_sparse.forecast.weights import canonical_name

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
    return {arch: save_model(folder / arch, arch) for arch in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Settings that name a file for three layers, and its weights."""
    path = tmp_path_factory.mktemp("forecast") / "f.safetensors"
    weights = save_forecast(path, 3, 128)
    return {"algorithm": "sparda", "forecast": str(path)}, weights


@pytest.fixture(scope="module")
def runs(models: dict, forecast: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All eager runs, in one process because starting one takes longest."""
    cases = {arch: case(path, LOOKAHEAD) for arch, path in models.items()}
    cases["forecast"] = case(models["llama"], forecast[0])
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


@pytest.mark.slow
def test_compiled_taps_are_recorded_before_attention(tmp_path):
    """Six layers, so that taps share memory; snapshots are taken inside the attention op."""
    path = save_model(tmp_path / "model", "llama", layers=6)
    weights = save_forecast(tmp_path / "f.safetensors", 6, 128)
    settings = {"algorithm": "sparda", "forecast": str(tmp_path / "f.safetensors")}
    cases = {
        "forecast": case(path, settings),
        "lookahead": case(path, LOOKAHEAD),
        "stock": case(path, None),
    }
    runs = run_tapped(tmp_path / "run", cases, enforce_eager=False)
    model, inputs = reference(path, runs["stock"]["tokens"])
    layers = model.model.layers
    check(runs["forecast"], model, inputs, [learned(weights, i) for i in range(6)])
    check(runs["lookahead"], model, inputs, [own_and_next(layers, i) for i in range(6)])
    for name in ("forecast", "lookahead"):
        assert runs[name]["tokens"] == runs["stock"]["tokens"]


@pytest.mark.slow
def test_spawned_workers_build_the_tapped_class(models, runs, tmp_path):
    cases = {"run": case(models["llama"], LOOKAHEAD)}
    run = run_tapped(tmp_path, cases, in_process=False)["run"]
    assert run["models"] == ["SpardaLlamaForCausalLM"]
    for weight, same in zip(run["weights"][0], runs["llama"]["weights"][0], strict=True):
        assert torch.equal(weight, same)
    assert run["tokens"] == runs["stock"]["tokens"]


# ---- without an engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("long", [False, True])
def test_rotation_partial_and_long(partial, long, monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import (
        get_rope,
        phi3_long_rope_scaled_rope,
    )

    from vllm_sparse.forecast.tap import ForecastTap

    rotary_dim = int(partial * DIM)
    factors = [1.0 + 0.3 * i for i in range(rotary_dim // 2)]
    parameters: dict[str, Any] = {
        "rope_type": "longrope" if long else "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial,
    }
    if long:
        parameters |= {
            "short_factor": [1.0] * (rotary_dim // 2),
            "long_factor": factors,
            "original_max_position_embeddings": 256,
        }
    served = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: served)
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(DIM, 1024, rope_parameters=parameters, dtype=torch.float32)
    values = torch.randn(7, 2, KV_HEADS, DIM)
    tap = ForecastTap(rotary, 16, values, False)
    positions = torch.tensor([0, 1, 5, 255, 256, 700, 1023])
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    scale = 1.0
    if long:
        frequencies = frequencies / torch.tensor(factors)
        scale = (1 + torch.tensor(4.0).log() / torch.tensor(256.0).log()).sqrt()
    angle = (positions[:, None] * frequencies)[:, None]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    for part in range(2):
        x = values[:, part]
        before = x.clone()
        first, second = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
        want = torch.cat(
            (first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]), -1
        )
        torch.testing.assert_close(tap.rotate(positions, x), want, atol=2e-4, rtol=2e-4)
        assert torch.equal(x, before)
    assert tap.rotate(positions[:0], values[:0, 0]).shape == (0, KV_HEADS, DIM)


def test_an_unfilled_tap_shows():
    from vllm_sparse.errors import IntegrityError
    from vllm_sparse.forecast.tap import ForecastTap, Taps

    tap = ForecastTap(None, 16, torch.zeros(8, 2, KV_HEADS, DIM), has_bias=True)
    weight, bias = torch.randn(KV_HEADS * DIM, 16), torch.randn(KV_HEADS * DIM)
    tap.fill(0, weight, bias)
    assert not tap.ready
    taps = Taps()
    taps._taps.append(tap)
    with pytest.raises(IntegrityError, match="--load-format auto"):
        taps.finish()
    x = torch.randn(9, 16)  # one padded row more than there is room for
    tap(x, torch.zeros(9, 1))
    torch.testing.assert_close(tap.values[:, 0], (x @ weight.T + bias)[:8].view(8, KV_HEADS, DIM))
    assert tap.values[:, 1].isnan().all()
    tap.fill(-1, weight)
    assert tap.ready
    taps.finish()


def _layers(**changes: Any) -> list:
    from vllm_sparse.forecast.tap import _Layer

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
    from vllm_sparse.errors import UnsupportedError
    from vllm_sparse.forecast.tap import _check_uniform, _query_norm, _query_rows

    _check_uniform(_layers(), "Model")
    for changes, message in (
        ({"head_size": 64}, r"Model cannot look a layer ahead: head_size differs.*\[32, 64\]"),
        ({"rotary": object()}, "different rotary embeddings.*selector query or previous"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            _check_uniform(_layers(**changes), "Model")
    layers = _layers()
    for layer in layers:
        layer.linear.tp_size = 4
    with pytest.raises(UnsupportedError, match="over 4 ranks repeats the 2 KV heads"):
        _check_uniform(layers, "Model")
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


@pytest.mark.parametrize("broken", ["qkv_proj", "rotary_emb", "attn"])
def test_attention_of_another_shape_is_refused(broken):
    from vllm.model_executor.layers.attention import Attention

    from vllm_sparse.errors import UnsupportedError
    from vllm_sparse.forecast.tap import _attention_layers

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


def _config(architecture: str, selector: str) -> Any:
    return SimpleNamespace(
        additional_config={"vllm_sparse": {"selector": selector}},
        model_config=SimpleNamespace(
            architecture=architecture,
            hf_config=SimpleNamespace(architectures=[architecture]),
        ),
    )


def test_routing():
    from vllm_sparse.errors import UnsupportedError
    from vllm_sparse.forecast.routing import route_model

    config = _config("LlamaForCausalLM", "lookahead-query")
    for _ in range(2):
        route_model(config)
        assert config.model_config.hf_config.architectures == ["SpardaLlamaForCausalLM"]
    for selector in ("query", "previous"):
        for name in ("LlamaForCausalLM", "FalconForCausalLM"):
            config = _config(name, selector)
            route_model(config)
            assert config.model_config.hf_config.architectures == [name]
    with pytest.raises(
        UnsupportedError, match=r"FalconForCausalLM is not among.*query or previous"
    ):
        route_model(_config("FalconForCausalLM", "lookahead-query"))


def test_every_architecture_is_vllms_and_registered_lazily():
    from vllm.model_executor.models import ModelRegistry

    from vllm_sparse.forecast import tapped
    from vllm_sparse.forecast.routing import ARCHITECTURES, PREFIX, register_architectures

    for _ in range(2):
        register_architectures()
    for name in ARCHITECTURES:
        entry = ModelRegistry.models[PREFIX + name]
        assert (entry.module_name, entry.class_name) == (tapped.__name__, PREFIX + name)
    stock = ModelRegistry.models["LlamaForCausalLM"].load_model_cls()
    ours = ModelRegistry.models["SpardaLlamaForCausalLM"].load_model_cls()
    assert ours is tapped.SpardaLlamaForCausalLM
    assert issubclass(ours, stock)
    assert ours.packed_modules_mapping is stock.packed_modules_mapping
    assert ours.hf_to_vllm_mapper is stock.hf_to_vllm_mapper
    with pytest.raises(AttributeError):
        _ = tapped.SpardaFalconForCausalLM


if __name__ == "__main__":
    _main(sys.argv[1])
