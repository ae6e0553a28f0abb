# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's references by hand, against each other and against plain Hugging Face."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface

from reference import hf_sparda as hf
from reference import random_models
from reference import sparda_bruteforce as bf

SMALL = {"block_size": 32, "kernel_stride": 8, "local_blocks": 2, "top_k": 5, "dense_len": 100}
LARGE = {"block_size": 64, "kernel_stride": 16, "local_blocks": 1, "top_k": 3, "dense_len": 0}
CASES = [pytest.param("llama", LARGE, id="llama-large")] + [
    pytest.param(arch, SMALL, id=f"{arch}-small") for arch in random_models.ARCHITECTURES
]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=random_models.ARCHITECTURES)
def saved(request, tmp_path_factory):
    """A model and a Forecast file for it."""
    folder = tmp_path_factory.mktemp("model")
    path, forecast = folder / request.param, folder / "forecast.safetensors"
    random_models.save_random_model(path, request.param, layers=3)
    random_models.save_random_forecast(forecast, path, bias=request.param == "qwen2")
    return hf.load_model(path), forecast


def prompt(seed, length=300):
    return random.Random(seed).choices(range(1024), k=length)


# ---- the brute force, by hand --------------------------------------------------------------------


def test_by_hand():
    # Windows of 4 every 2 tokens: 0123, 2345, 4567; the ninth token completes none.
    keys = torch.arange(9.0).view(1, 9, 1)
    assert bf.compress_keys(keys, 4, 2) == [[[1.5], [3.5], [5.5]]]
    assert bf.compress_keys(keys[:, :3], 4, 2) == [[]]
    assert [len(bf.complete_windows(n)) for n in (0, 31, 32, 47, 48, 64)] == [0, 0, 1, 1, 2, 3]
    assert hf.compressed_keys(keys, 2).flatten().tolist() == [1.5, 3.5, 5.5]
    assert hf.compressed_keys(keys[:, :3], 2).shape == (1, 0, 1)

    # Two heads of one group over weights 1 3 and, at a later token, 1 3 4; nothing before token 3.
    compressed = torch.tensor([1.0, 3.0, 4.0]).double().log().view(1, 3, 1)
    query = torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 3, 1)
    scores = bf.query_scores(query, compressed, [2, 6, 7], 4, 2)
    expected = [[0, 0, 0], [1 / 4 + 1 / 2, 3 / 4 + 1 / 2, 0], [11 / 24, 17 / 24, 20 / 24]]
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(expected))
    fast = hf.window_probabilities(query, compressed.float(), torch.tensor([2, 6, 7]), 2)
    torch.testing.assert_close(fast[0], torch.tensor(expected))

    # Blocks of 4 windows: windows 0-3, 3-7, 7-11, 11-15.
    row = [0, 1, 2, 9, 4, 5, 6, 3, 8, 0, 0, 1]
    assert [bf.block_score(row, m) for m in range(5)] == [9, 9, 8, 1, -math.inf]
    # Token 64 * 6: forced are 0 (init), 5 and 6; of 1 to 4 the best is 1, then 2, then 3.
    scores = torch.tensor([[row]], dtype=torch.float32)
    for top_k, blocks in (
        (3, [0, 5, 6]),
        (4, [0, 1, 5, 6]),
        (5, [0, 1, 2, 5, 6]),
        (6, [0, 1, 2, 3, 5, 6]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (9, [0, 1, 2, 3, 4, 5, 6, -1, -1]),
    ):
        assert bf.select_blocks(scores, [64 * 6], local_blocks=1, top_k=top_k) == [[blocks]]
    # Forced blocks overlap at the start; a token reads no block after its own.
    assert bf.select_blocks(scores, [70], local_blocks=1, top_k=4) == [[[0, 1, -1, -1]]]

    assert hf.cut_gap([8.0, 4.0, 3.0], 1, False) == 0.5
    assert hf.cut_gap([8.0, 4.0, 3.0], 2, True) == 0.25
    assert hf.cut_gap([8.0, 4.0, 4.0, 3.0], 2, False) == 0.125  # a plateau moves as one
    assert hf.cut_gap([8.0, 4.0], 2, False) == hf.cut_gap([8.0], 0, False) == math.inf


def test_fast_selection_equals_brute_force():
    """The fast selection of the Hugging Face reference against the brute force."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(200):
        per_block, stride = rng.choice([2, 4, 8]), rng.choice([4, 16])
        init, local, extra = rng.randint(0, 2), rng.randint(1, 3), rng.randint(0, 4)
        settings = hf.Settings(
            block_size=per_block * stride,
            kernel_stride=stride,
            init_blocks=init,
            local_blocks=local,
            top_k=init + local + 1 + extra,
        )
        n = rng.randint(1, 12 * per_block * stride)
        positions = torch.tensor(sorted(rng.sample(range(n), min(n, 5))))
        count = len(bf.complete_windows(n, 2 * stride, stride))
        scores = torch.randint(4, (2, len(positions), count), generator=generator).float()
        chosen, _ = hf.select(scores, positions, settings)
        every = torch.ones(len(positions), dtype=torch.bool)
        expected = bf.select_blocks(
            scores, positions, settings.block_size, init, local, settings.top_k, stride
        )
        assert hf.block_lists(chosen, every, settings.top_k).tolist() == expected


# ---- generation ----------------------------------------------------------------------------------


def test_dense_and_everything_equal_hugging_face(saved):
    """Dense lengths, and budgets as large as the context, give the tokens of model.generate."""
    model, forecast = saved
    ids = prompt(0, 318)
    config = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    inputs = torch.tensor([ids])
    expected = model.generate(inputs, attention_mask=torch.ones_like(inputs), **config)
    expected = expected[0, len(ids) :].tolist()
    assert hf.generate(model, ids, 12, dense_len=330).tokens == expected
    for selector in hf.SELECTORS:
        run = {"selector": selector, "forecast": forecast, "sparse_prefill": True}
        everything = hf.generate(model, ids, 12, **{**SMALL, **run, "top_k": 11})
        assert everything.tokens == expected
        assert everything.min_gap == math.inf
        assert everything.blocks[-1][0][0, 0].tolist() == [*range(11)]  # 329 tokens of 32
        assert hf.generate(model, ids, 12, **{**SMALL, **run}).tokens != expected
        last = hf.generate(model, ids, 12, **{**SMALL, **run, "dense_len": 329}).blocks
        assert all(bool((layer == -1).all()) for step in last for layer in step)
        # 329 tokens seen by the last step, which is dense up to 329 and sparse above 328.
        last = hf.generate(model, ids, 12, **{**SMALL, **run, "dense_len": 328}).blocks
        assert all(bool((layer == -1).all()) for step in last[:-1] for layer in step)
        assert all(bool((layer >= 0).all()) for layer in last[-1])
    assert model.config._attn_implementation != hf.ATTENTION_NAME


@pytest.mark.parametrize(("saved", "settings"), CASES, indirect=["saved"])
def test_decoding_equals_one_pass(saved, settings):
    """Prefill and cached decode equal one forward over everything."""
    (model, forecast), steps, worst = saved, 16, 0.0
    for selector in hf.SELECTORS:
        for sparse_prefill in (False, True):
            run = {"selector": selector, "forecast": forecast, "sparse_prefill": sparse_prefill}
            ids = prompt(1, 283)
            decoded = hf.generate(model, ids, steps, **settings, **run)
            whole = ids + decoded.tokens[:-1]
            logits, _, blocks = hf.evaluate(model, whole, len(ids), **settings, **run)
            worst = max(worst, float((logits[len(ids) - 1 :] - decoded.logits).abs().max()))
            for layer, of_layer in enumerate(blocks):
                rows = torch.cat([step[layer] for step in decoded.blocks], dim=1)
                assert torch.equal(rows, of_layer), (selector, sparse_prefill, layer)
            # A prompt that ends elsewhere makes no difference once prompts are sparse too.
            if sparse_prefill:
                again = hf.generate(model, whole[:200], 4, **settings, **run)
                torch.testing.assert_close(again.logits[0], logits[199], atol=1e-4, rtol=1e-4)
            # Fed tokens: the same rows.
            fed = hf.generate(model, ids, 5, continuation=whole[len(ids) :][:4], **settings, **run)
            assert torch.equal(fed.logits, decoded.logits[:5])
    assert worst < 1e-4


@pytest.mark.parametrize(("saved", "settings"), CASES, indirect=["saved"])
def test_every_layer_equals_brute_force(saved, settings):
    """Each layer's blocks from its own q, k and inputs, computed apart with loops."""
    (model, forecast), steps, compared = saved, 6, 0
    future, current = hf.load_forecast(forecast)
    config = model.config
    num_groups = config.num_key_value_heads
    own = hf._attention
    queries = {}  # layer -> queries of all tokens so far

    def rope(vector, position):
        """Rotate-half RoPE from the model's frequencies, component by component."""
        out, half = list(vector), len(vector) // 2
        for c, frequency in enumerate(model.model.rotary_emb.inv_freq.tolist()):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            out[c] = vector[c] * cos - vector[c + half] * sin
            out[c + half] = vector[c + half] * cos + vector[c] * sin
        return out

    def forecasts(run, layer, rows, positions):
        x = run.inputs[layer - 1 if layer else 0].double()
        attention = model.model.layers[layer].self_attn
        dim, heads_per_group = attention.head_dim, config.num_attention_heads // num_groups
        result = []
        for g in range(num_groups):
            if run.settings.selector == "forecast":
                weight, bias = future[layer - 1] if layer else current
                weight = weight[g * dim : (g + 1) * dim].double()
                bias = bias[g * dim : (g + 1) * dim] if bias is not None else torch.zeros(dim)
            else:
                weight, bias = torch.zeros(dim, x.shape[1]).double(), torch.zeros(dim).double()
                for h in range(g * heads_per_group, (g + 1) * heads_per_group):
                    part = slice(h * dim, (h + 1) * dim)
                    weight += attention.q_proj.weight[part].double() / heads_per_group
                    if attention.q_proj.bias is not None:
                        bias += attention.q_proj.bias[part].double() / heads_per_group
                if hasattr(attention, "q_norm"):
                    weight *= attention.q_norm.weight[:, None].double()
            vectors = [weight @ x[t] + bias for t in rows]
            result.append([rope(v.tolist(), i) for v, i in zip(vectors, positions, strict=True)])
        return torch.tensor(result, dtype=torch.float64)

    def checked(module, query, key, *args, **kwargs):
        nonlocal compared
        run, layer, s = kwargs["sparda_run"], module.layer_idx, kwargs["sparda_run"].settings
        output = own(module, query, key, *args, **kwargs)
        n, num_tokens = key.shape[2], query.shape[2]
        before = [queries[layer]] if n > num_tokens else []
        queries[layer] = torch.cat([*before, query[0]], dim=1)
        candidates = {n - num_tokens, n - (num_tokens + 1) // 2, n - 1}
        found = run.blocks[layer]
        for i in sorted(candidates):
            row = found[:, i - (n - num_tokens)]
            sparse = i + 1 > s.dense_len and (i >= run.prompt_len or s.sparse_prefill)
            if not sparse:
                assert bool((row == -1).all())
                continue
            compressed = torch.tensor(
                bf.compress_keys(key[0, :, : i + 1], 2 * s.kernel_stride, s.kernel_stride)
            ).view(num_groups, -1, module.head_dim)
            if s.selector in ("query", "previous"):
                j = i if s.selector == "query" else i - 1
                q = queries[layer][:, j : j + 1] if j >= 0 else torch.zeros_like(query[0, :, :1])
                scores = bf.query_scores(q, compressed, [j], 2 * s.kernel_stride, s.kernel_stride)
            else:
                f = forecasts(run, layer, [i - (n - num_tokens)], [i])
                scores = bf.forecast_scores(f, compressed)
            expected = bf.select_blocks(
                torch.tensor(scores).view(num_groups, 1, -1),
                [i],
                s.block_size,
                s.init_blocks,
                s.local_blocks,
                s.top_k,
                s.kernel_stride,
            )
            compared += num_groups
            for g in range(num_groups):
                if row[g].tolist() != expected[g][0]:
                    assert run.gap < 1e-5, (layer, i, row[g].tolist(), expected[g][0])
        return output

    AttentionInterface.register(hf.ATTENTION_NAME, checked)
    try:
        for selector in hf.SELECTORS:
            for sparse_prefill in (False, True):
                queries.clear()
                run = {"selector": selector, "sparse_prefill": sparse_prefill}
                hf.generate(model, prompt(2, 317), steps, forecast=forecast, **run, **settings)
    finally:
        AttentionInterface.register(hf.ATTENTION_NAME, own)
    assert compared > 100


def test_hidden_values_change_nothing(saved):
    """Changing a value that no layer may see changes nothing; one that may, does."""
    model, forecast = saved
    ids = prompt(3, 260)
    run = {"selector": "query", "forecast": forecast, **SMALL}
    seen = []
    own = hf._attention

    def attention(module, query, key, value, *args, **kwargs):
        state = kwargs["sparda_run"]
        output = own(module, query, key, value, *args, **kwargs)
        if query.shape[2] > 1 or module.layer_idx != 1:
            return output
        size = state.settings.block_size
        for g, blocks in enumerate(state.blocks[1][:, 0].tolist()):
            hidden = [t for t in range(key.shape[2]) if t // size not in blocks]
            shown = next(t for t in range(key.shape[2]) if t // size in blocks[1:])
            heads = slice(
                g * query.shape[1] // key.shape[1], (g + 1) * query.shape[1] // key.shape[1]
            )
            for tokens in (hidden, [shown]):
                changed = value.clone()
                changed[0, g, tokens] += 1000
                other = own(module, query, key, changed, *args, **kwargs)
                same = [torch.equal(other[0][0, :, h], output[0][0, :, h]) for h in range(8)]
                assert len(hidden) > 50
                assert all(same[heads]) == (tokens is hidden)
                seen.append(len(tokens))
        return output

    AttentionInterface.register(hf.ATTENTION_NAME, attention)
    try:
        hf.generate(model, ids, 4, **run)
    finally:
        AttentionInterface.register(hf.ATTENTION_NAME, own)
    assert len(seen) == 3 * 2 * 2


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_continuations_vary(saved):
    """Prompts, selectors and settings give different, non-constant continuations."""
    (model, forecast), runs = saved, []
    for seed in range(2):
        ids = prompt(seed, 400)
        runs.append(hf.generate(model, ids, 60).tokens)
        for selector in hf.SELECTORS:
            for sparse_prefill in (False, True):
                run = {"selector": selector, "sparse_prefill": sparse_prefill}
                got = hf.generate(model, ids, 60, forecast=forecast, **run, **SMALL)
                runs.append(got.tokens)
                blocks = [step[layer] for step in got.blocks[1:] for layer in range(2)]
                assert len({tuple(b.flatten().tolist()) for b in blocks}) > 20, "selection varies"
                assert any(not torch.equal(b[0], b[1]) for b in blocks), "heads differ"
    assert len({tuple(run) for run in runs}) == len(runs)
    for run in runs:
        assert len(set(run)) > 15, run
        tail = run[-24:]
        assert not any(tail[: 24 - p] == tail[p:] for p in range(1, 9)), "a short cycle"
    for wrong in (
        {"top_k": 3},
        {"kernel_stride": 32},
        {"selector": "best"},
        {"selector": "forecast"},
    ):
        with pytest.raises(ValueError, match=r"."):
            hf.generate(model, prompt(0), 1, **{**SMALL, **wrong})


# ---- MiniCPM -------------------------------------------------------------------------------------


def test_minicpm_is_computed_as_described(tmp_path):
    """Granite with our mapping equals MiniCPM's description, written out: scaled embedding,

    scaled residual branches, divided last hidden state, longrope with a factor per frequency.
    """
    path = tmp_path / "model"
    random_models.save_random_model(path, "minicpm", layers=3)
    model = hf.load_model(path)
    config = json.loads((path / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = hidden // heads
    ids = prompt(4, 70)
    positions = torch.arange(len(ids)).double()
    factors = torch.tensor(config["rope_scaling"]["short_factor"]).double()
    assert config["rope_scaling"]["short_factor"] == config["rope_scaling"]["long_factor"]
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2).double() / dim) / factors
    angle = positions[:, None] * frequencies
    cos, sin = angle.cos(), angle.sin()

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[name]

    def rope(x):  # [T, heads, dim]
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        c, s = cos[:, None], sin[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    branch = config["scale_depth"] / math.sqrt(layers)
    x = w["model.embed_tokens.weight"][ids] * config["scale_emb"]
    for number in range(layers):
        at = f"model.layers.{number}."
        y = norm(x, at + "input_layernorm.weight")
        q = rope((y @ w[at + "self_attn.q_proj.weight"].T).unflatten(-1, (heads, dim)))
        k = rope((y @ w[at + "self_attn.k_proj.weight"].T).unflatten(-1, (kv_heads, dim)))
        v = (y @ w[at + "self_attn.v_proj.weight"].T).unflatten(-1, (kv_heads, dim))
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        k, v = (z.repeat_interleave(heads // kv_heads, dim=0) for z in (k, v))
        logits = q @ k.transpose(1, 2) / math.sqrt(dim)
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        y = torch.softmax(logits.masked_fill(future, -math.inf), -1) @ v
        y = y.transpose(0, 1).flatten(1) @ w[at + "self_attn.o_proj.weight"].T
        x = x + y * branch
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(y @ w[at + "mlp.gate_proj.weight"].T)
        y = (gate * (y @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
        x = x + y * branch
    x = norm(x, "model.norm.weight") / (hidden / config["dim_model_base"])
    logits = x @ w["lm_head.weight"].T
    ours, _, _ = hf.evaluate(model, ids, len(ids))
    worst = float((ours - logits).abs().max())
    assert worst < 1e-4 * float(logits.abs().max())
