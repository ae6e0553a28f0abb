# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The training loop: it learns, resumes without a trace, stops cleanly and says what is wrong."""

from __future__ import annotations

import csv
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from support.training import KINDS, backbone, scaled_backbones, sequences, trainer
from transformers import Qwen2Config, Qwen2Model

from vllm_sparse.errors import ConfigError, IntegrityError
from vllm_sparse.training.trainer import (
    Interrupted,
    OutOfMemoryError,
    checkpoints,
    read_checkpoint,
)


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
@pytest.mark.parametrize("kind", ["fine", "query", "block-mass"])
def test_loss_is_the_same_whatever_scales_the_logits(tmp_path, kind, cached):
    losses = []
    for number, frozen in enumerate(scaled_backbones()):
        cache = tmp_path / f"cache{number}" if cached else None
        run = trainer(tmp_path / str(number), sequences(1), frozen, cache, teacher=kind)
        losses.append(next(run.train()).layers)
    assert min(losses[0]) > 1e-3
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_last_complete_step(tmp_path, number):
    before = signal.getsignal(number)
    whole = trainer(tmp_path / "whole", steps=4)
    list(whole.train())
    run = trainer(tmp_path / "parts", steps=4)
    steps = run.train()
    next(steps)
    next(steps)
    # In the middle of the third step.
    original = run._backward
    run._backward = lambda *arguments: (
        os.kill(os.getpid(), number),
        original(*arguments),
    )
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted):
        next(steps)
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-000002.pt"]
    assert signal.getsignal(number) is before
    assert run.interrupt.signal == number
    again = trainer(tmp_path / "parts", steps=4)
    again.resume(checkpoints(tmp_path / "parts")[-1])
    list(again.train())
    assert torch.equal(weights(again), weights(whole))


def test_a_second_signal(tmp_path):
    run = trainer(tmp_path)
    with run.interrupt.installed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert run.interrupt.signal == signal.SIGTERM


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Interrupted), (None, RuntimeError)])
def test_the_other_processes_stop_first(tmp_path, number, error):
    """A sum over processes that have ended fails; after a signal that is no error."""

    def reduce(tensor, how):
        run.interrupt.signal = number
        raise RuntimeError("connection closed by peer")

    run = trainer(tmp_path)
    steps = run.train()
    next(steps)
    run._world, run._accelerator = 2, SimpleNamespace(reduce=reduce)
    with pytest.raises(error):
        next(steps)
    assert len(checkpoints(tmp_path)) == (number is not None)


def test_processes_train_what_one_would(tmp_path):
    """Two of them, here threads that meet to add up, with two of four sequences a step each."""
    options = {"batch_size": 4, "steps": 3}
    parts, barrier = [None, None], threading.Barrier(2, timeout=60)
    runs = [trainer(tmp_path / str(rank), **options) for rank in range(2)]
    for rank, run in enumerate(runs):

        def reduce(tensor, how, rank=rank):
            parts[rank] = tensor
            barrier.wait()
            both = torch.stack(parts)
            barrier.wait()
            return both.sum(0) if how == "sum" else both.mean(0)

        run._rank, run._world, run._accelerator = rank, 2, SimpleNamespace(reduce=reduce)
    whole = trainer(tmp_path / "whole", **options)
    expected = list(whole.train())
    with ThreadPoolExecutor(2) as threads:
        logs = list(threads.map(lambda run: list(run.train()), runs))
    for run, log in zip(runs, logs, strict=True):
        for entry, alone in zip(log, expected, strict=True):
            assert entry.layers == pytest.approx(alone.layers, rel=1e-4)
            assert entry.gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-3)
        torch.testing.assert_close(weights(run), weights(whole), rtol=1e-3, atol=1e-4)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert [len(checkpoints(tmp_path / str(rank))) for rank in range(2)] == [1, 0]


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
        trainer(tmp_path, frozen=backbone((Qwen2Config, Qwen2Model))).resume(saved)
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


def test_a_step_that_is_not_finite_ends_the_run_and_leaves_what_was_sound(tmp_path):
    run = trainer(tmp_path, steps=4, save_every=1)
    steps = run.train()
    next(steps)
    sound, backward = weights(run), run._backward

    def broken(sample, losses):
        backward(sample, losses)
        if sample.layer == 1:
            run.forecast.projections[1].weight.grad[0, 0] = torch.nan
            losses[1] = torch.nan

    run._backward = broken
    with pytest.raises(IntegrityError, match=r"step 2: gradients are not finite .*\[1\]"):
        next(steps)
    assert torch.equal(weights(run), sound)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000001.pt"]
