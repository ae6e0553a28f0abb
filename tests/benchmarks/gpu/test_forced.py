# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA at forced miss rates on a GPU: sizes, and what happens with little time."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Annotated

import pytest
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from benchmarks.gpu import bench, stages
from benchmarks.gpu.shapes import MINICPM


def test_offload_arms_have_the_same_device_memory():
    from benchmarks.gpu import forced

    default = bench.parser_of().parse_args([])
    sizes = {"context": default.sparda_context, "top_k": 96, "generated": 400}
    sizes["device_kv_gib"] = default.device_kv_gib
    found = {arm: forced.plan(MINICPM, arm, most_host_gib=64, **sizes) for arm in forced.ARMS}
    batches = {arm: sized.batch for arm, sized in found.items()}
    assert batches == {"resident": 4, "offload": 19, "first": 17}
    assert found["offload"].slab_gib == pytest.approx(19 * 0.1875, rel=1e-4)
    # Whole requests leave some of it unused, no arm much more than another.
    for sized in found.values():
        assert 0.94 * default.device_kv_gib < sized.device_gib <= default.device_kv_gib
    little = forced.plan(MINICPM, "offload", most_host_gib=5, **sizes)
    assert little.batch == 5
    with pytest.raises(stages.NotAvailableError, match="hold no request"):
        forced.plan(MINICPM, "resident", most_host_gib=64, **{**sizes, "device_kv_gib": 0.5})


def offload_subject(tmp_path, report=None):
    from benchmarks.gpu import forced

    options = bench.parser_of().parse_args(["--out", str(tmp_path)])
    options.work = tmp_path
    report = report or stages.Report(tmp_path / "offload.json")
    return forced._Subject("offload", 4e12, 50e9, report, options)


def test_only_what_the_plugin_refuses_is_not_available(tmp_path, monkeypatch):
    from benchmarks.gpu import llms
    from vllm_sparse.errors import ConfigError

    def refuse(_: object) -> None:
        raise ConfigError("too little\nmemory")

    # As vLLM's configuration, which is validated by pydantic, has what is refused before a worker.
    with pytest.raises(ValidationError) as wrapped:
        TypeAdapter(Annotated[int, BeforeValidator(refuse)]).validate_python(1)
    with pytest.raises(ValidationError) as others:
        TypeAdapter(int).validate_python("one")

    for error, expected in (
        (ConfigError("too little\nmemory"), stages.NotAvailableError),
        (wrapped.value, stages.NotAvailableError),
        (others.value, ValidationError),
        (RuntimeError("CUDA error"), RuntimeError),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(llms, "build", fails)
        with pytest.raises(expected):
            offload_subject(tmp_path).start()


@pytest.mark.parametrize(
    ("seconds", "share"), [(0.5, 1.0), (5.0, 0.57), (9.0, 0.316), (60.0, None)]
)
def test_with_little_time_prompts_are_shorter(tmp_path, monkeypatch, seconds, share):
    import torch

    from benchmarks import commands, live
    from benchmarks.gpu import forced
    from vllm_sparse.config import load_settings

    calls, begun = [], []
    llm = SimpleNamespace(collective_rpc=lambda run, args: calls.append((run, *args)))
    monkeypatch.setattr(forced, "_available_gib", lambda: 100.0)
    monkeypatch.setattr(commands, "prefill", lambda *_: seconds)
    monkeypatch.setattr(commands, "begin", lambda _, prompts, generated: begun.append(prompts))
    report = stages.Report(tmp_path / "offload.json", deadline=time.time() + 100)
    subject = offload_subject(tmp_path, report)
    subject.llm = llm
    if share is None:
        with pytest.raises(stages.NotAvailableError, match="no time"):
            subject.begin()
        return
    subject.begin()
    sized = report.facts["plan"]
    length = report.facts["prompt_tokens"]
    assert length == pytest.approx(share * (sized["context"] - sized["generated"]), rel=0.03)
    assert [len(prompt) for prompt in begun[0]] == [length] * sized["batch"]
    assert calls[0] == (live.force, length)
    assert len({way for run, way in calls[1:]}) == 4
    # From so many blocks, every rate can be forced.
    runtime = SimpleNamespace(
        settings=load_settings({"vllm_sparse": report.facts["settings"]}, "sparda"),
        compressed=lambda layer: torch.empty(0),
        kernels=SimpleNamespace(select_blocks=None),
    )
    choice = live.ForcedChoice(runtime, length)
    found = [choice.set_rate(rate) for rate in subject.rates]
    assert found == pytest.approx(subject.rates, abs=0.01)
