# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The training loop: layer-wise backward passes, checkpoints, and resumption without a trace.

A checkpoint holds the weights, the optimiser and the step. Everything else (order of the data, rows
of a sequence) follows from the seed and the step, so a resumed run repeats what an uninterrupted
one does. On Ctrl-C and SIGTERM the step in progress is dropped and the last complete one is saved.
"""

from __future__ import annotations

import csv
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_sparse.errors import ConfigError, IntegrityError, VllmSparseError
from vllm_sparse.paths import atomic_path
from vllm_sparse.training.data import sequence_index
from vllm_sparse.training.objective import forecast_loss
from vllm_sparse.training.samples import CachedSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm_sparse.training.backbone import Backbone
    from vllm_sparse.training.forecast import Forecast
    from vllm_sparse.training.samples import LayerSample, SampleSource
    from vllm_sparse.training.settings import TrainSettings

# What may differ between a run and its continuation without changing what is computed before.
_MAY_CHANGE = {"steps", "save_every", "keep", "chunk"}


class OutOfMemoryError(VllmSparseError, MemoryError):
    """Training does not fit; the message says what to change."""


class Interrupted(Exception):
    """Ctrl-C was pressed, or SIGTERM came."""


class InterruptFlag:
    """Set by Ctrl-C and SIGTERM; a second Ctrl-C interrupts at once.

    Attributes:
        signal: Number of the first signal, None until one comes.
    """

    def __init__(self) -> None:
        """Starts unset."""
        self.signal: int | None = None

    def raise_if_set(self) -> None:
        """Raises :class:`Interrupted` after a signal."""
        if self.signal is not None:
            raise Interrupted

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles both signals within the block (in the main thread only)."""

        def handle(number: int, frame: Any) -> None:
            if self.signal is None:
                self.signal = number
            # A scheduler and torchrun may both send SIGTERM, which must not cost what is saved.
            elif number == signal.SIGINT:
                raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class StepLog:
    """What one optimiser step reports.

    Attributes:
        step: Steps done, this one included.
        loss: Mean over layers and sequences.
        gradient_norm: Before clipping.
        lr: Learning rate.
        seconds: Wall time.
        layers: Loss of every layer.
    """

    step: int
    loss: float
    gradient_norm: float
    lr: float
    seconds: float
    layers: list[float] = field(default_factory=list)


class Trainer:
    """Trains a Forecast.

    Attributes:
        forecast: What is trained.
        step: Optimiser steps done.
        interrupt: Set to stop at the next layer.
    """

    def __init__(
        self,
        settings: TrainSettings,
        backbone: Backbone,
        forecast: Forecast,
        source: SampleSource | CachedSource,
        sequences: Tensor,
        folder: Path,
        accelerator: Any = None,
    ) -> None:
        """Prepares a run.

        Args:
            settings: The recipe.
            backbone: The frozen model.
            forecast: Initialised; moved to the model's device.
            source: Gives the samples.
            sequences: Token ids, ``[sequences, seq_len]``.
            folder: For checkpoints and the log.
            accelerator: An ``accelerate.Accelerator`` if there are several processes.

        Raises:
            ConfigError: The batch does not divide among the processes.
        """
        self.settings, self.forecast, self.step = settings, forecast.to(backbone.device), 0
        self.interrupt = InterruptFlag()
        self._backbone, self._source, self._sequences = backbone, source, sequences
        self._folder, self._accelerator = folder, accelerator
        if isinstance(source, CachedSource):
            source.check = self.interrupt.raise_if_set
        self._rank = accelerator.process_index if accelerator else 0
        self._world = accelerator.num_processes if accelerator else 1
        if settings.batch_size % self._world:
            raise ConfigError(
                f"batch_size={settings.batch_size} does not divide among {self._world} processes"
            )
        self._optimiser = torch.optim.AdamW(
            forecast.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self._rank == 0

    def train(self) -> Iterator[StepLog]:
        """Runs to the last step, saving checkpoints, and yields after every step.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last complete step is saved.
            OutOfMemoryError: With advice.
        """
        layers = self._backbone.num_layers
        log = _CsvLog(self._folder / "log.csv", self.step, layers) if self.is_main else None
        with self.interrupt.installed():
            try:
                while self.step < self.settings.steps:
                    entry = self._one_step()
                    if log:
                        log.write(entry)
                    if self.step % self.settings.save_every == 0:
                        self.save()
                    yield entry
            except Interrupted:
                self.save()
                raise
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise OutOfMemoryError(self._advice()) from error
            except RuntimeError as error:
                if "not enough memory" in str(error) or "can't allocate" in str(error):
                    raise OutOfMemoryError(self._advice()) from error
                raise
        if self.step % self.settings.save_every:
            self.save()

    def _one_step(self) -> StepLog:
        started, settings = time.monotonic(), self.settings
        rate = settings.learning_rate(self.step)
        losses = torch.zeros(self._backbone.num_layers, device=self._backbone.device)
        self._optimiser.zero_grad(set_to_none=True)
        for place in range(self._rank, settings.batch_size, self._world):
            number = self.step * settings.batch_size + place
            index = sequence_index(number, len(self._sequences), settings.seed)
            self._source.visit(
                index, self._sequences[index], lambda sample: self._backward(sample, losses)
            )
            self.interrupt.raise_if_set()
        if self._world > 1:
            losses = self._reduce(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.forecast.parameters(), settings.grad_clip)
        if not bool(norm.isfinite()):
            wrong = [number for number, loss in enumerate(losses.tolist()) if not isfinite(loss)]
            raise IntegrityError(
                f"step {self.step + 1}: gradients are not finite (losses that are not, by layer: "
                f"{wrong or 'none'}). Nothing of this step is kept, and checkpoints are older. "
                "Use --dtype bfloat16 or float32 if this was float16, look at the text of the "
                "step's sequences, and go on with --resume"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self.step += 1
        seconds = time.monotonic() - started
        layers = losses.tolist()
        return StepLog(self.step, sum(layers) / len(layers), float(norm), rate, seconds, layers)

    def _reduce(self, losses: Tensor) -> Tensor:
        """Sums losses and gradients over the processes."""
        try:
            for parameter in self.forecast.parameters():
                parameter.grad = self._accelerator.reduce(parameter.grad, "sum")
            summed: Tensor = self._accelerator.reduce(losses, "sum")
        except RuntimeError:
            # The others stopped at their own signals before they came here.
            self.interrupt.raise_if_set()
            raise
        return summed

    @torch.enable_grad()
    def _backward(self, sample: LayerSample, losses: Tensor) -> None:
        """Adds one layer's gradient; its graph is freed before the next layer runs."""
        self.interrupt.raise_if_set()
        forecast = self.forecast(sample.layer, sample.inputs, sample.cos, sample.sin)
        loss = forecast_loss(
            forecast,
            sample.teacher,
            sample.compressed_keys,
            sample.positions,
            sample.tokens,
            self.settings.geometry,
            self.settings.supervision,
            self.settings.chunk,
        )
        loss = loss / self.settings.batch_size
        loss.backward()
        losses[sample.layer] += loss.detach()

    def save(self) -> None:
        """Writes a checkpoint of the last complete step and drops the oldest ones."""
        if not self.is_main:
            return
        state = {
            "step": self.step,
            "forecast": {name: v.cpu() for name, v in self.forecast.state_dict().items()},
            "optimiser": self._optimiser.state_dict(),
            "settings": self.settings.model_dump(),
            "base_model": self._backbone.name,
            "fingerprint": self._backbone.fingerprint(),
            "sequences": list(self._sequences.shape),
        }
        with atomic_path(self._folder / f"checkpoint-{self.step:06d}.pt") as target:
            torch.save(state, target)
        for old in checkpoints(self._folder)[: -self.settings.keep]:
            old.unlink()

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint.

        Raises:
            ConfigError: It is of another model, other data or another recipe.
        """
        state = read_checkpoint(path)
        if state["fingerprint"] != self._backbone.fingerprint():
            raise ConfigError(
                f"{path}: was trained on another base model ({state['base_model']}; this is "
                f"{self._backbone.name}, or the same with other weights or another dtype). Give "
                "the same --model and --dtype, or start afresh in another --folder"
            )
        shapes = {name: tuple(v.shape) for name, v in self.forecast.state_dict().items()}
        found = {name: tuple(v.shape) for name, v in state["forecast"].items()}
        if shapes != found:
            names = sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n))
            raise ConfigError(
                f"{path}: its tensors do not fit: {names[0]} is {found.get(names[0], 'missing')}, "
                f"expected {shapes.get(names[0], 'none')}. Use the settings it was trained with "
                "(--bias) or start afresh"
            )
        now, then = self.settings.model_dump(), state["settings"]
        may_change = set(_MAY_CHANGE)
        if self.settings.schedule == "linear":
            may_change -= {"steps"}
        changed = [key for key in now if key not in may_change and now[key] != then.get(key)]
        if changed:
            listed = ", ".join(f"{key} {then.get(key)!r} -> {now[key]!r}" for key in changed)
            raise ConfigError(
                f"{path}: was trained with other settings ({listed}). Resume with the same ones, "
                "or start afresh in another --folder"
            )
        if state["sequences"] != list(self._sequences.shape):
            raise ConfigError(
                f"{path}: was trained on {state['sequences']} tokens of data, this is "
                f"{list(self._sequences.shape)}; give the same --data (for a data set, of which no "
                "more is read than --steps and --batch-size need, --max-sequences "
                f"{state['sequences'][0]}), or start afresh"
            )
        self.forecast.load_state_dict(state["forecast"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step = int(state["step"])

    def _advice(self) -> str:
        settings = self.settings
        return (
            f"out of memory at step {self.step} with seq_len={settings.seq_len}, "
            f"chunk={settings.chunk}. Memory grows with seq_len and, for one chunk of rows, with "
            "chunk * seq_len: lower --chunk first (same result), then --queries, then --seq-len. "
            "--batch-size needs no memory. Continue with --resume"
        )


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; no code in it is run.

    Raises:
        ConfigError: It is missing or of another kind.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "forecast", "optimiser", "settings", "fingerprint"} <= state.keys():
            raise ValueError("entries are missing")
    except Exception as error:  # torch raises many kinds
        raise ConfigError(
            f"{path}: not a checkpoint of train-forecast ({error}). Delete it to resume from an "
            "older one in the same folder"
        ) from error
    return state


class _CsvLog:
    """One line per step; lines of steps that are trained again are dropped."""

    def __init__(self, path: Path, step: int, layers: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [
                    row
                    for row in csv.reader(file)
                    if row and row[0].isdigit() and int(row[0]) <= step
                ]
        header = ["step", "loss", "gradient_norm", "lr", "seconds"]
        header += [f"layer_{layer}" for layer in range(layers)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *kept])
        self._path = path

    def write(self, entry: StepLog) -> None:
        """Appends a step."""
        row = [entry.step, entry.loss, entry.gradient_norm, entry.lr, round(entry.seconds, 3)]
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow([*row, *entry.layers])
