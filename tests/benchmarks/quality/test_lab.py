# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The laboratory's answers, against Hugging Face under an explicit mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from reference import hf_rocketkv, hf_sparda
from reference.random_models import save_random_forecast
from transformers import AutoModelForCausalLM

from benchmarks.quality.candidates import schemes as schemes_of
from benchmarks.quality.lab import Lab
from benchmarks.quality.prompts import LAST, Network, saved
from benchmarks.quality.schemes import (
    FEW_FORCED,
    KeepIdeal,
    Layer,
    ReadBlocks,
    ReadPages,
    ReadTokens,
    Scheme,
)
from vllm_sparse.policies.votes import select_prompt_tokens

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 12
SHARPER = {"llama": 2.0, "qwen2": 1.0}


def votes(layer: Layer, count: int) -> torch.Tensor:
    """Stage 1 as the policy has it."""
    return select_prompt_tokens(layer.last[:, -32:], layer.keys, count, scale=layer.scale)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_prompt_goes_on_from_the_one_before(folder: Path, prompts: list[list[int]]) -> None:
    network = Network(folder, torch.float32)
    first = prompts[0]
    assert len(first) > LAST
    for tokens in (first[:-30] + prompts[1][:80], first[:150] + prompts[1]):
        network.prompt(first)
        assert network._known(tokens) >= min(150, len(tokens) - LAST) > 0
        got, network._tokens = network.prompt(tokens), []
        assert network._known(tokens) == 0
        for name, wanted in vars(network.prompt(tokens)).items():
            torch.testing.assert_close(getattr(got, name), wanted)


def test_prompts_may_be_computed_in_another_dtype(llama: Path, prompts: list[list[int]]) -> None:
    """And the model is the same behind it, its rotary frequencies above all."""
    tokens = prompts[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    wanted = model(torch.tensor([tokens])).past_key_values.layers[-1].keys[0]
    network = Network(llama, prompt_dtype=torch.float32)
    for _ in range(2):
        got, network._tokens = network.prompt(tokens).keys[-1], []
        torch.testing.assert_close(got, wanted)
    assert network._model.lm_head.weight.dtype == torch.bfloat16


def test_the_dense_answer_is_computed_where_it_votes(llama: Path, prompts: list[list[int]]) -> None:
    network = Network(llama, torch.float32)
    prompt = saved(network, prompts[0], None)
    ideal = {"ideal": Scheme(lambda n: n - 160, KeepIdeal())}
    lab = Lab(network, prompt, TOKENS, set())
    first = lab.answers(ideal)
    assert lab.answer
    assert lab.answers(ideal) == first
    plain = Lab(network, prompt, TOKENS, set())
    plain.answers({"all": Scheme()})
    assert "answer" not in vars(plain)


def test_answers_are_hugging_face_s(folder: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """Also where logits have another scale than 1 / sqrt(D)."""
    network = Network(folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in (*network.layers, *model.model.layers):
        layer.self_attn.scaling *= SHARPER[folder.name]
    tokens, file = prompts[0], tmp_path / "prompt.pt"
    for _ in range(2):  # computed, then read from the file
        lab = Lab(network, saved(network, tokens, file), TOKENS, set())
    assert lab.answer == hf_rocketkv.generate(model, tokens, TOKENS, sparse=False)
    dropped, pages = 10, (4, 20, 64)
    schemes = {
        "both": Scheme(lambda n: n - 16 * dropped, votes, lambda _: ReadPages(*pages)),
        "stage 1": Scheme(lambda n: n - 16 * dropped, votes),
        "stage 2": Scheme(read=lambda _: ReadPages(*pages), skip=1),
        "all": Scheme(read=lambda _: ReadTokens(10_000)),
    }
    found = lab.answers(schemes)
    common = {"page_size": 4, "top_r": 20, "top_k": 64}
    wanted = {
        "both": {"dropped_blocks": dropped, **common},
        "stage 1": {"dropped_blocks": dropped, "stage2": False},
        "stage 2": {"stage1": False, "skip_layers": 1, **common},
    }
    for name, options in wanted.items():
        assert found[name] == hf_rocketkv.generate(model, tokens, TOKENS, **options), name
    assert found["all"] == lab.answer
    assert len({tuple(each) for each in found.values()}) == 4, "the schemes should differ"


@pytest.mark.parametrize("selector", ["query", "forecast", "previous"])
def test_blocks_are_hugging_face_s(
    folder: Path, prompts: list[list[int]], tmp_path: Path, selector: str
) -> None:
    file = tmp_path / "forecast.safetensors"
    save_random_forecast(file, folder, bias=True, kernel_size=32, **vars(FEW_FORCED))
    network = Network(folder, torch.float32, file)
    lab = Lab(network, saved(network, prompts[0], None), TOKENS, set())
    wanted = hf_sparda.generate(
        folder, prompts[0], TOKENS, forecast=file, selector=selector,
        init_blocks=1, local_blocks=2, top_k=5, dense_len=0,
    )  # fmt: skip
    found = lab.answers({"it": Scheme(read=lambda _: ReadBlocks(5, selector))})["it"]
    reliable = wanted.reliable_steps(1e-4, 1e-5)
    assert reliable > TOKENS // 2
    assert found[:reliable] == wanted.tokens[:reliable]
    assert found[:reliable] != lab.answer[:reliable]
    kept, read = lab.recall(Scheme(read=lambda _: ReadBlocks(5, selector)))
    assert kept == pytest.approx([1] * 3)
    assert max(read) < 1


def test_a_forecast_needs_weights(llama: Path) -> None:
    with pytest.raises(ValueError, match="forecast-16 needs weights: give --forecast"):
        schemes_of(["forecast-16"], 1024, Network(llama, torch.float32))


def test_end_of_text_ends_a_reply(llama: Path, prompts: list[list[int]]) -> None:
    network = Network(llama, torch.float32)
    prompt = saved(network, prompts[0], None)
    whole = Lab(network, prompt, TOKENS, set()).answer
    end = whole[5]
    assert Lab(network, prompt, TOKENS, {end}).answer == whole[: whole.index(end)]


def test_recall_is_a_share_of_the_dense_attention(llama: Path, prompts: list[list[int]]) -> None:
    network = Network(llama, torch.float32)
    lab = Lab(network, saved(network, prompts[0], None), TOKENS, set())
    kept, read = lab.recall(Scheme())
    assert kept == pytest.approx([1] * 3) == read
    kept, read = lab.recall(Scheme(lambda n: n - 300, votes, lambda _: ReadTokens(64)))
    best, _ = lab.recall(Scheme(lambda n: n - 300, KeepIdeal(pool=1)))
    for share, most, paid in zip(kept, best, read, strict=True):
        assert 0.1 < paid < share < most < 1
