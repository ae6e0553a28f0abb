# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Shared fixtures."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pkgutil
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One OpenMP thread per process: with more, the barrier of tiny models costs more than their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest
import torch
from support import adversary, interpreter

if not torch.cuda.is_available():
    # GPU kernels are tested in Triton's interpreter, which Triton and the kernels choose when they
    # are first imported (transformers imports Triton). Engines that tests start do not inherit it.
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ModuleNotFoundError):
        patch.setenv("TRITON_INTERPRET", "1")
        package = importlib.import_module("vllm_sparse.kernels.triton")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
        adversary.install()
        interpreter.install()

from reference import random_models
from support.engine import BLOCK_SIZE, SETTINGS, SPARDA_SETTINGS, run_engine

if TYPE_CHECKING:
    from collections.abc import Callable

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Where a GPU is, it may be missing; the last lines are about parts that have no promised name.
with contextlib.suppress(ModuleNotFoundError, AttributeError):
    from hypothesis import settings

    # What passed once passes again, and no example fails for what others do to the machine. To look
    # for what no run has seen yet: --hypothesis-profile default.
    settings.register_profile("suite", deadline=None, derandomize=True, database=None)
    settings.load_profile("suite")
    # Else constants of our modules are drawn, too, of those that a worker has loaded until then.
    drawing = importlib.import_module("hypothesis.internal.conjecture.providers")
    nothing = drawing._local_constants
    drawing._get_local_constants = lambda: nothing


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same numbers whichever tests its process ran before."""
    torch.default_generator.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN in tests, so that reading it shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.fill_(torch.nan)
            return tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(scope="session")
def triton_cache(pytestconfig: pytest.Config) -> Path:
    """What Triton has compiled, by a hash of all that it compiled it from; kept between runs."""
    return pytestconfig.cache.mkdir("triton")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention matters (std 0.1): dummy weights prove nothing."""
    path = tmp_path_factory.mktemp("models") / "llama"
    random_models.save_random_model(path)
    return path


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2, for biased projections and another group size."""
    path = tmp_path_factory.mktemp("models") / "qwen2"
    random_models.save_random_model(path, "qwen2")
    return path


@pytest.fixture(scope="session")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Granite, whose logits have a scale of their own."""
    path = tmp_path_factory.mktemp("models") / "granite"
    random_models.save_random_model(path, "granite")
    return path


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Granite 4 H, with recurrent states beside attention."""
    path = tmp_path_factory.mktemp("models") / "hybrid"
    random_models.save_random_hybrid(path)
    return path


@pytest.fixture(scope="session")
def delta_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-Next in bfloat16: gated delta nets beside gated attention."""
    path = tmp_path_factory.mktemp("models") / "delta_net"
    random_models.save_random_delta_net(path)
    return path


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random gpt-oss: learned sinks, window layers between full ones."""
    path = tmp_path_factory.mktemp("models") / "gpt_oss"
    random_models.save_random_gpt_oss(path)
    return path


@pytest.fixture(scope="session")
def windowed(llama: Path, tmp_path_factory) -> Path:
    """The random Llama with window layers around a full one."""
    model = tmp_path_factory.mktemp("models") / "windowed"
    shutil.copytree(llama, model)
    config = json.loads((model / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config.update(layer_types=kinds, sliding_window=128)
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Six prompts of unlike lengths, pairs of which share their first 384 tokens."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(1024, (3, 384), generator=generator)
    tails = [torch.randint(1024, (216 + 7 * i,), generator=generator) for i in range(6)]
    return [torch.cat((shared[i // 2], tails[i])).tolist() for i in range(6)]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Runs an engine for all processes of the suite, of which the others wait for the first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def run(name: str, *args: Any, **options: Any) -> dict:
        result = folder / f"{name}.json"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                result.write_text(json.dumps(run_engine(*args, **options)))
        return json.loads(result.read_text())

    return run


@pytest.fixture(scope="session")
def sparse_run(once: Callable[..., dict], llama: Path, prompts: list[list[int]]) -> dict:
    """The undisturbed run that others are compared with; itself compared with Hugging Face."""
    return once("sparse", llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE)


@pytest.fixture(scope="session")
def stock_run(once: Callable[..., dict], llama: Path, prompts: list[list[int]]) -> dict:
    """Stock vLLM on the six prompts."""
    return once("stock", llama, prompts, block_size=BLOCK_SIZE)


@pytest.fixture(scope="session")
def sparda_run(once: Callable[..., dict], llama: Path, prompts: list[list[int]]) -> dict:
    """SPARDA's undisturbed run on the six prompts; itself compared with Hugging Face."""
    return once(
        "sparda", llama, prompts, settings=SPARDA_SETTINGS, backend="sparda", max_num_seqs=6
    )


@pytest.fixture
def fresh_launches(monkeypatch):
    """A process reads its table of launches once; each test has its own."""
    from vllm_sparse.kernels.triton import launch

    monkeypatch.delenv(launch.LAUNCHES_ENV, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch.launches.cache_clear()
    yield
    launch.launches.cache_clear()
