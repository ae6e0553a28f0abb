# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What single requests may ask for; they are checked where they come in, and in their engine."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from support.configuration import configuration
from support.policies import make_policy
from vllm import PoolingParams, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse.backends.allowed import allowed_requests, watch_inputs
from vllm_sparse.errors import RequestError
from vllm_sparse.kv.requests import watch_engines
from vllm_sparse.kv.spec import PolicySpec

INTERPRETED = {"kernels": "triton"}


def test_what_requests_may_ask_for():
    """Budgets where a step can serve several; dense ones where no graph stands against it."""

    def allowed(name, settings, **changes):
        config = configuration(name, settings, use_v2_model_runner=True, **changes)
        return allowed_requests(config)

    dense, budget = {"vllm_sparse.sparse": False}, {"vllm_sparse.token_budget": 2048}
    plain = allowed("QUEST", {"max_token_budget": 2048})
    plain.check(dense)
    plain.check(budget)
    allowed("QUEST", {}, model_config__is_hybrid=True).check(dense)
    query = {"selector": "query"}
    allowed("SPARDA", {**query, **INTERPRETED}).check(dense)
    allowed("SPARDA", {**query, "sparse_prefill": True}).check(dense)
    for what, found, why in (
        (budget, allowed("QUEST", {}), "more than the 1024 that this server allows"),
        ({"vllm_sparse.token_budget": 20}, plain, "fewer than two pages"),
        (budget, allowed("QUEST", INTERPRETED), "a captured graph reads one number"),
        (budget, allowed("SPARDA", query), "frames for top_k blocks"),
        (
            dense,
            allowed("SPARDA", {**query, "sparse_prefill": True, **INTERPRETED}),
            "sparse_prefill",
        ),
        (dense, allowed("QUEST", {"allow_dense": False}), "allow_dense: false"),
        (dense, allowed("SPARDA", {**query, "allow_dense": False}), "allow_dense: false"),
    ):
        with pytest.raises(RequestError, match=why):
            found.check(what)
    assert allowed("FLASH_ATTN", {}) is None


def asking(**asked) -> SamplingParams:
    return SamplingParams(extra_args={f"vllm_sparse.{name}": x for name, x in asked.items()})


def processor_of(backend: str, settings: dict | None = None) -> InputProcessor:
    processor = InputProcessor.__new__(InputProcessor)
    processor.vllm_config = configuration(backend, settings)
    return processor


@pytest.fixture
def _inputs(monkeypatch):
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda *_, **__: "taken")
    watch_inputs()


@pytest.mark.usefixtures("_inputs")
def test_wrong_requests_are_refused_by_the_engine_that_they_are_for():
    """Others in one process may allow more, or serve another backend."""
    small, large = processor_of("QUEST"), processor_of("QUEST", {"max_token_budget": 4096})
    stock = processor_of("FLASH_ATTN")
    budget, wrong = asking(token_budget=2048), asking(spars=False)
    for processor, params in (
        (small, SamplingParams()), (small, PoolingParams()), (large, budget), (stock, budget),
        (stock, wrong), (small, SamplingParams(extra_args={"mine": "x"})),
    ):  # fmt: skip
        assert processor.process_inputs("a", {}, params) == "taken"
    for params, why in ((wrong, r"vllm_sparse\.spars: unknown"), (budget, "more than the 1024")):
        with pytest.raises(ValueError, match=why) as refused:
            small.process_inputs("a", {}, params)
        assert isinstance(refused.value, VLLMClientError)  # the API answers with status 400


@pytest.mark.usefixtures("_inputs")
def test_sessions_with_streamed_inputs_are_refused():
    ours, stock = processor_of("ROCKETKV"), processor_of("FLASH_ATTN")
    assert stock.process_inputs("a", {}, SamplingParams(), resumable=True) == "taken"
    assert ours.process_inputs("a", {}, SamplingParams(), resumable=False) == "taken"
    with pytest.raises(VLLMClientError, match="as one prompt"):
        ours.process_inputs("a", {}, SamplingParams(), resumable=True)


def test_an_engine_refuses_what_its_front_end_did_not(monkeypatch):
    """By what the scheduler's specs carry, which workers have sent."""
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda *_: "taken")
    watch_engines()
    layer = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32)

    def core_of(*settings):
        core = EngineCore.__new__(EngineCore)
        specs = [
            PolicySpec.wrap(
                layer, make_policy(), allowed=allowed_requests(configuration("QUEST", x))
            )
            for x in settings
        ]
        specs = pickle.loads(pickle.dumps([layer, PolicySpec.merge(specs)]))
        assert specs[1] == PolicySpec.wrap(layer, make_policy()), "nothing that keeps layers apart"
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        config = SimpleNamespace(kv_cache_groups=groups)
        core.scheduler = SimpleNamespace(kv_cache_config=config)
        return core

    def request(params, resumable=False):
        return SimpleNamespace(sampling_params=params, resumable=resumable)

    small, large = core_of({}, {}), core_of({"max_token_budget": 4096})
    assert small.preprocess_add_request(request(asking(sparse=False))) == "taken"
    assert large.preprocess_add_request(request(asking(token_budget=2048))) == "taken"
    for wrong in (
        request(asking(token_budget=2048)), request(asking(spars=1)), request(None, True),
    ):  # fmt: skip
        with pytest.raises(RequestError):
            small.preprocess_add_request(wrong)
