# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV's references by hand, against each other and against plain Hugging Face."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from reference import hf_rocketkv as hf
from reference import rocketkv_bruteforce as bf
from reference.random_models import save_random_model


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, request.param)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def column(values):
    """[1, n, 1] keys, one number per token."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def logs(weights):
    return [math.log(weight) for weight in weights]


# ---- plan ----------------------------------------------------------------------------------------

# S, token budget, capacity, prompt budget, page size, top_r, top_k; head size 128, 128 new tokens.
TABLE = [
    (8192, 256, 1448, 1320, 3, 67, 128),
    (8192, 1024, 3717, 3589, 2, 70, 512),
    (16128, 256, 1593, 1465, 3, 61, 128),
    (16128, 512, 2887, 2759, 3, 68, 256),
    (32128, 256, 1619, 1491, 3, 60, 128),
    (32128, 512, 3186, 3058, 3, 61, 256),
    (32128, 2048, 9613, 9485, 3, 81, 1024),
    (64128, 512, 3238, 3110, 3, 60, 256),
    (96128, 256, 1401, 1273, 3, 70, 128),
    (96128, 1024, 6498, 6370, 3, 60, 512),
    (109000, 256, 1360, 1232, 3, 72, 128),
]


def test_plan():
    for total, budget, *expected in TABLE:
        got = bf.plan(total - 128, 128, budget, 128)
        values = [got[k] for k in ("capacity", "prompt_budget", "page_size", "top_r", "top_k")]
        assert values == expected, (total, budget, values, expected)
        assert not got["dense"]
    # The last row of the published table has 50 new tokens and rounds the channels to the nearest
    # (128 * 3 / (1296 / 256) = 75.85 -> 76); rounding down gives 75.
    got = bf.plan(131072 - 50, 50, 256, 128)
    assert (got["capacity"], got["prompt_budget"], got["page_size"]) == (1296, 1246, 3)
    assert (got["top_r"], got["top_k"]) == (75, 128)

    # ratio2 = 1448 / 256 = 5.65625: page 3 becomes 4 (128 * 4 / 5.65625 = 90.5 channels), or 2
    # where nothing is as large (45.3 channels).
    got = bf.plan(8192 - 128, 128, 256, 128, page_sizes=(1, 2, 4))
    assert (got["page_size"], got["top_r"]) == (4, 90)
    got = bf.plan(8192 - 128, 128, 256, 128, page_sizes=(2, 1))
    assert (got["page_size"], got["top_r"]) == (2, 45)
    # Page 2 is allowed as it is.
    got = bf.plan(8192 - 128, 128, 1024, 128, page_sizes=(1, 2, 4))
    assert (got["page_size"], got["top_r"]) == (2, 70)
    # Page 1 with a forced 4: 4 * 128 channels would be read, there are 128.
    got = bf.plan(8192 - 128, 128, 8192, 128, page_sizes=(4,))
    assert (got["page_size"], got["top_r"], got["dense"]) == (4, 128, True)

    # The budget holds everything: nothing is dropped.
    got = bf.plan(100, 20, 1024, 64)
    assert got == {
        "capacity": 120,
        "prompt_budget": 100,
        "page_size": 1,
        "top_r": 64,
        "top_k": 512,
        "dense": True,
    }
    # 44 tokens at ratio 2.75 (split 0.2876): 44 / 1.338 = 32; 28 for the prompt, the window is 32.
    got = bf.plan(40, 4, 16, 64)
    assert (got["capacity"], got["prompt_budget"], got["dense"]) == (32, 32, False)
    # The window is longer than the prompt.
    got = bf.plan(20, 4, 16, 64)
    assert (got["prompt_budget"], got["dense"]) == (20, True)
    # 1128 / 70.5 ** 0.568 = 100 tokens are less than twice the 128 new ones: 256.
    got = bf.plan(1000, 128, 16, 64)
    assert (got["capacity"], got["prompt_budget"]) == (256, 128)


# ---- stage 1 -------------------------------------------------------------------------------------


def test_stage_1_by_hand():
    # One query of 1 and keys log(weight): probabilities weight / 16.
    keys, query = column(logs([1, 5, 2, 1, 3, 4])), torch.ones(1, 1, 1, dtype=torch.float64)
    scores = bf.prompt_scores(query, keys, 1, torch.float64)
    torch.testing.assert_close(scores[0] * 16, torch.tensor([1.0, 5, 2, 1, 3]).double())
    assert bf.select_prompt_tokens(query, keys, 3, 1).tolist() == [[1, 4, 5]]
    # A kernel of 3 turns 1 5 2 1 3 into 5 5 5 3 3: the first two of the plateau.
    scores = bf.prompt_scores(query, keys, 3, torch.float64)
    torch.testing.assert_close(scores[0] * 16, torch.tensor([5.0, 5, 5, 3, 3]).double())
    assert bf.select_prompt_tokens(query, keys, 3, 3).tolist() == [[0, 1, 5]]
    assert bf.select_prompt_tokens(query, keys, 1, 3).tolist() == [[5]]  # the window alone
    for budget in (6, 9):
        assert bf.select_prompt_tokens(query, keys, budget, 3).tolist() == [[0, 1, 2, 3, 4, 5]]

    # Two queries over weights 1 2 3 6. The first sees 0..2: 1/6 2/6. The second is zero: 1/4 each.
    keys = column(logs([1, 2, 3, 6]))
    query = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None]
    scores = bf.prompt_scores(query, keys, 1, torch.float64)
    torch.testing.assert_close(scores[0] * 12, torch.tensor([5.0, 7.0]).double())

    # Two groups of two heads. The second head of a group inverts the weights; group 1 has the keys
    # of group 0 reversed before the window.
    # Group 0: 1 4 3 2 / 12 (window 2) plus 12 3 4 6 / 31 (window 6): 0.470 0.430 0.379 0.360.
    keys = torch.cat([column(logs([1, 4, 3, 2, 2])), column(logs([2, 3, 4, 1, 2]))])
    query = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)[:, None, None]
    scores = bf.prompt_scores(query, keys, 1, torch.float64)
    expected = [a / 12 + b / 31 for a, b in zip([1, 4, 3, 2], [12, 3, 4, 6], strict=True)]
    torch.testing.assert_close(scores[0], torch.tensor(expected).double())
    torch.testing.assert_close(scores[1], torch.tensor(expected[::-1]).double())
    assert bf.select_prompt_tokens(query, keys, 3, 1).tolist() == [[0, 1, 4], [2, 3, 4]]


# ---- stage 2 -------------------------------------------------------------------------------------


def stage2(query, keys, page_size, top_r, top_k, force_newest):
    """The choice of the brute force, after a comparison with the fast form in both precisions."""
    n = keys.shape[1]
    key_min, key_max = bf.page_extrema(keys, page_size)
    chosen = bf.select_decode_tokens(
        query, key_min, key_max, n, page_size, top_r, top_k, force_newest
    )
    for dtype in (torch.float64, torch.float32):
        fast, gap, channel_gap = hf.select_decode_tokens_fast(
            query, keys, page_size, top_r, top_k, force_newest=force_newest, dtype=dtype
        )
        same = [tokens.tolist() for tokens in fast] == chosen
        near_tie = dtype == torch.float32 and min(gap, channel_gap) < 1e-5
        assert same or near_tie, (dtype, gap, channel_gap, fast, chosen)
    return chosen


def test_stage_2_by_hand():
    low, high = bf.page_extrema(column([3, -1, 4, 1, 5]), 2)
    assert low.flatten().tolist() == [-1, 1, 5]
    assert high.flatten().tolist() == [3, 4, 5]

    # Two pages of two tokens, query (2, -1).
    keys = torch.tensor([[[1.0, 0], [0, 2], [3, -4], [-1, 1]]])
    query = torch.tensor([[2.0, -1]])
    low, high = bf.page_extrema(keys, 2)
    # One channel, the first; its sum is positive, so maxima 1 and 3: scores 2 and 6.
    tau = math.sqrt(2 * 2 / 3)
    total = 2 * math.exp(2 / tau) + 2 * math.exp(6 / tau)
    got = bf.decode_page_scores(query, low, high, 4, 2, 1)[0]
    for value, score in zip(got, (2, 6), strict=True):
        assert math.isclose(value, score / tau - math.log(total), rel_tol=1e-12)
    # Both: the second channel's sum is negative, minima 0 and -4: scores 2 and 10, tau sqrt(2).
    tau = math.sqrt(2)
    total = 2 * math.exp(2 / tau) + 2 * math.exp(10 / tau)
    got = bf.decode_page_scores(query, low, high, 4, 2, 2)[0]
    for value, score in zip(got, (2, 10), strict=True):
        assert math.isclose(value, score / tau - math.log(total), rel_tol=1e-12)
    assert stage2(query, keys, 2, 1, 2, False) == [[2, 3]]
    # Query (-2, 1), one channel: minima 0 and -1, scores 0 and 2; three tokens end in page 0.
    assert stage2(-query, keys, 2, 1, 3, False) == [[0, 2, 3]]
    # A fifth token in a page of its own with the lowest score.
    keys = torch.cat([keys, torch.tensor([[[-9.0, 0]]])], dim=1)
    assert stage2(query, keys, 2, 1, 3, False) == [[0, 2, 3]]
    assert stage2(query, keys, 2, 1, 3, True) == [[2, 3, 4]]
    assert stage2(query, keys, 2, 1, 2, True) == [[2, 4]]  # page 1 in part: its first token
    assert stage2(query, keys, 2, 1, 9, True) == [[0, 1, 2, 3, 4]]
    # Fewer tokens than the newest page holds: its first ones.
    assert stage2(query, keys[:, :4], 4, 1, 3, True) == [[0, 1, 2]]

    # Heads 3 and -1 over keys 0 1 -2 in pages of one: probabilities .05 .95 .00 and .11 .04 .84 add
    # up to .16 .99 .84. (Adding the scores 0 2 -4 first would take token 0 before token 2.)
    query = torch.tensor([[3.0], [-1.0]])
    assert stage2(query, column([0, 1, -2]).float(), 1, 1, 1, False) == [[1]]
    assert stage2(query, column([0, 1, -2]).float(), 1, 1, 2, False) == [[1, 2]]
    # Probabilities of exp(-1000) and less are still in order.
    query = torch.tensor([[1000.0]])
    assert stage2(query, column([0, 1, 2, 3]).float(), 1, 1, 3, False) == [[1, 2, 3]]
    # All equal: the lowest pages.
    for query in (torch.ones(1, 1), torch.zeros(1, 1)):
        keys = column([0] * 6).float()
        assert [t.tolist() for t in hf.select_decode_tokens_fast(query, keys, 2, 1, 3)[0]] == [
            [0, 4, 5]
        ]
        low, high = bf.page_extrema(keys, 2)
        assert bf.select_decode_tokens(query, low, high, 6, 2, 1, 3) == [[0, 4, 5]]
        assert bf.select_decode_tokens(query, low, high, 6, 2, 1, 3, False) == [[0, 1, 2]]

    # Weights 1 and 3 over values 10 and 20.
    keys, values = column(logs([1, 3, 7])), column([10, 20, 99])
    query = torch.ones(1, 1, dtype=torch.float64)
    assert math.isclose(bf.attend(query, keys, values, [[0, 1]]).item(), 17.5)
    assert math.isclose(bf.attend(query, keys, values, [[0]]).item(), 10)
    assert math.isclose(bf.attend(query, keys, values, [[0, 1]], scale=2.0).item(), 19)


def test_fast_stage_2_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    for _ in range(150):
        groups, per_group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 16])
        head_dim, page_size = rng.choice([4, 16, 32]), rng.choice([1, 2, 3, 4])
        n = rng.randint(1, 90)
        query = torch.randn(groups * per_group, head_dim, generator=generator)
        keys = torch.randn(groups, n, head_dim, generator=generator)
        query *= rng.choice([0.3, 1, 5])
        chosen = stage2(
            query,
            keys,
            page_size,
            rng.randint(1, head_dim),
            rng.randint(1, n + 5),
            rng.random() < 0.5,
        )
        assert all(tokens == sorted(set(tokens)) for tokens in chosen)
        assert max(tokens[-1] for tokens in chosen) < n


# ---- generation ----------------------------------------------------------------------------------

SPARSE = {"dropped_blocks": 8, "block_size": 16, "page_size": 2, "top_r": 20, "top_k": 48}


def prompt(seed, length=300):
    return random.Random(seed).choices(range(1024), k=length)


def test_a_budget_of_everything_equals_hugging_face(model):
    """Dense generation, and budgets as large as the context, give the tokens of model.generate."""
    ids = prompt(0)
    config = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}
    inputs = torch.tensor([ids])
    expected = model.generate(inputs, attention_mask=torch.ones_like(inputs), **config)
    expected = expected[0, len(ids) :].tolist()
    assert hf.generate(model, ids, 30, sparse=False) == expected
    everything = {"dropped_blocks": 0, "page_size": 3, "top_r": 20}
    assert hf.generate(model, ids, 30, top_k=len(ids) + 30, **everything) == expected
    assert hf.generate(model, ids, 30, stage1=False, stage2=False) == expected
    assert hf.generate(model, ids, 30, top_k=1, skip_layers=99, **everything) == expected
    assert hf.generate(model, ids, 30, top_k=8, **everything) != expected
    assert model.config._attn_implementation != hf.ATTENTION_NAME


@pytest.mark.parametrize(
    "changes",
    [{}, {"stage2": False}, {"skip_layers": 1, "page_size": 3, "window": 16, "kernel_size": 7}],
)
def test_every_layer_equals_brute_force(model, changes):
    """At each step and layer: the brute force's choice and output for the model's own q, k, v."""
    steps, compared, worst = 8, 0, 0.0
    own = hf._attention

    def checked(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        nonlocal compared, worst
        run = kwargs["rocketkv_run"]
        was_prompt = run.in_prompt
        output = own(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        s, layer, n = run.settings, module.layer_idx, key.shape[2]
        if was_prompt:
            w = s["window"]
            kept = bf.select_prompt_tokens(
                query[0, :, n - w :], key[0], run.num_kept, s["kernel_size"]
            )
            assert torch.equal(run.kept[layer], kept)
            # The prompt is dense and causal: token t sees 0..t.
            for t in (0, 1, n // 2, n - 1):
                seen = [list(range(t + 1))] * key.shape[1]
                dense = bf.attend(query[0, :, t], key[0], value[0], seen)
                worst = max(worst, float((output[0][0, t] - dense).abs().max()))
            return output
        slots = []
        for g in range(key.shape[1]):
            slots.append(run.kept[layer][g].tolist() + list(range(run.prompt_len, n)))
        tokens = slots
        if s["stage2"] and layer >= s["skip_layers"]:
            compacted = torch.stack([key[0, g, slots[g]] for g in range(key.shape[1])])
            low, high = bf.page_extrema(compacted, s["page_size"])
            chosen = bf.select_decode_tokens(
                query[0, :, 0],
                low,
                high,
                len(slots[0]),
                s["page_size"],
                s["top_r"],
                s["top_k"],
            )
            tokens = [[slots[g][i] for i in chosen[g]] for g in range(key.shape[1])]
            assert all(len(row) == s["top_k"] and n - 1 in row for row in tokens)
        expected = bf.attend(query[0, :, 0], key[0], value[0], tokens)
        worst = max(worst, float((output[0][0, 0] - expected).abs().max()))
        compared += 1
        return output

    AttentionInterface.register(hf.ATTENTION_NAME, checked)
    try:
        hf.generate(model, prompt(1), steps, **{"window": 32, **SPARSE, **changes})
    finally:
        AttentionInterface.register(hf.ATTENTION_NAME, own)
    assert compared == (steps - 1) * model.config.num_hidden_layers
    assert worst < 1e-5


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_continuations_vary(model):
    """Different prompts, stages and settings give different, non-constant continuations."""
    dense = [hf.generate(model, prompt(seed), 60, sparse=False) for seed in range(3)]
    sparse = [hf.generate(model, prompt(seed), 60, **SPARSE) for seed in range(3)]
    stage1 = [hf.generate(model, prompt(seed), 60, stage2=False, **SPARSE) for seed in range(3)]
    no_drop = {**SPARSE, "dropped_blocks": 0}
    stage2 = [hf.generate(model, prompt(seed), 60, stage1=False, **no_drop) for seed in range(3)]
    skip = [hf.generate(model, prompt(seed), 60, skip_layers=1, **SPARSE) for seed in range(3)]
    runs = dense + sparse + stage1 + stage2 + skip
    assert len({tuple(run) for run in runs}) == len(runs)
    assert all(run[0] == dense[i % 3][0] for i, run in enumerate(runs)), "dense first token"
    for run in runs:
        assert len(set(run)) > 30, run
        tail = run[-24:]
        assert not any(tail[: 24 - p] == tail[p:] for p in range(1, 9)), "a short cycle"
    for wrong in ({"stage1": False}, {"dropped_blocks": 18}):
        with pytest.raises(ValueError, match=r"."):
            hf.generate(model, prompt(0), 1, **{**SPARSE, **wrong})
