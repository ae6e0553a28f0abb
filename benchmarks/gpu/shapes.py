# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Models that need no download: published shapes with random weights, and a small checkpoint."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from vllm_sparse.planner.shapes import Shape

LINEAR_SPREAD = 0.02


LLAMA = Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 500000.0)
MINICPM = Shape("MiniCPM4.1-8B", 32, 4096, 16384, 32, 2, 128, 73448, 10000.0)
TINY = Shape("tiny", 2, 128, 256, 4, 2, 64, 1024, 10000.0)


def config_of(shape: Shape, positions: int) -> dict:
    """``config.json`` of a Llama of this shape.

    Only sizes matter for time, so that scaled embeddings or residuals are left out.
    """
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": positions,
        "rope_theta": shape.rope_theta, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write_config(folder: Path, shape: Shape, positions: int) -> Path:
    """Writes a model folder without weights, for ``load_format="dummy"``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch) / "config.json"
        whole.write_text(json.dumps(config_of(shape, positions), indent=1))
        whole.replace(folder / "config.json")  # another stage may be reading it
    return folder


def randomise(worker: Any, seed: int) -> None:
    """Gives dummy weights the spread of trained ones, in place; called in vLLM's worker.

    vLLM fills them, norms included, with numbers so small that all logits are equal: ties go to
    the first tokens, and what is selected would be one run of memory, the best case for a gather.
    """
    import torch

    model = worker.model_runner.get_model()
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            generator = torch.Generator(weight.device).manual_seed(seed)
            seed += 1
            if "norm" in name:
                weight.fill_(1.0)
            else:
                spread = 1.0 if "embed_tokens" in name else LINEAR_SPREAD
                weight.normal_(0.0, spread, generator=generator)


def write_checkpoint(folder: Path, seed: int) -> Path:
    """Writes a small checkpoint whose attention decides its tokens.

    Dummy weights are so small that attention has no say, and any two backends agree.
    """
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        sizes = {"layers": 3, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}
        # Stages run at once: each of them writes its own, and the first one that is whole stays.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            whole = Path(scratch) / "checkpoint"
            save_random_llama(whole, vocab=2048, seed=seed, max_position_embeddings=8192, **sizes)
            with contextlib.suppress(OSError):  # there is one by now, of the same seed
                whole.rename(folder)
    return folder


def save_random_llama(folder: Path, **sizes: int) -> None:
    """Writes the random model that the tests use."""
    # Not as tests.reference: some other package's "tests" may be installed.
    sys.path.insert(0, str(machine.ROOT / "tests"))
    from reference import random_models

    random_models.save_random_model(folder, **sizes)


def random_prompt(seed: int, length: int, vocab: int) -> list[int]:
    """Random tokens, the same for the same seed."""
    return random.Random(seed).choices(range(3, vocab), k=length)


def parity_prompts(seed: int, *, tiny: bool = False) -> list[list[int]]:
    """Six prompts of unlike lengths, pairs of which share most of their tokens."""
    common, tail = (320, 80) if tiny else (1200, 300)
    prompts = []
    for index in range(6):
        shared = random_prompt(seed + 100 + index // 2, common, 1024)
        prompts.append(shared + random_prompt(seed + index, tail + 7 * index, 1024))
    return prompts
