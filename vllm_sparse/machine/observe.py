# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs the probe beside us, and takes what it has said when the time is up."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from typing import IO, Any, NamedTuple


class Observed(NamedTuple):
    """What the probe said.

    Attributes:
        facts: By stage.
        stopped: Why the stages that are not there are not: ``time`` is up, the probe ``died``, or
            nothing: all are there.
        noise: The end of what it printed beside that.
    """

    facts: dict[str, dict[str, Any]]
    stopped: str = ""
    noise: str = ""


class Probe:
    """A probe that runs; start it early, and collect late."""

    def __init__(self, module: str, arguments: tuple[str, ...], seconds: float) -> None:
        """Starts it.

        Args:
            module: A program that calls :func:`vllm_sparse.machine.probe.main`.
            arguments: Its own.
            seconds: It has.
        """
        self._deadline = time.monotonic() + seconds
        self._noise: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by collect
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._noise,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )  # fmt: skip

    def collect(self, wanted: str = "", most_s: float = 0.0) -> Observed:
        """Waits for the probe, but not beyond its time, and ends it.

        Args:
            wanted: A stage for which it may take longer.
            most_s: How much longer.
        """
        output = self._process.stdout
        assert output is not None
        text, over = b"", False
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not over:
                said = f'"stage": "{wanted}"'.encode() in text
                late = most_s if wanted and not said else 0.0
                left = self._deadline + late - time.monotonic()
                if left <= 0 or not selector.select(left):
                    break
                read = os.read(output.fileno(), 1 << 16)
                over = not read
                text += read
        code = self._process.wait() if over else None
        if code is None:
            self._process.kill()
            self._process.wait()
        output.close()
        self._noise.seek(0)
        noise = self._noise.read().decode(errors="replace").strip()
        self._noise.close()
        facts = {}
        for line in text.decode().splitlines(keepends=True):
            if line.endswith("\n"):
                found = json.loads(line)
                facts[found.pop("stage")] = found
        return Observed(facts, "time" if code is None else "died" if code else "", noise[-2000:])
