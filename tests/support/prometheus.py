# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A real Prometheus that scrapes every second, where there is one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def _program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PROMETHEUS")) or shutil.which(name)
    if found is None:
        pytest.skip(
            f"no {name}: apt-get install prometheus, or unpack that package (apt-get download, "
            "dpkg -x) and name the folder of its programs in PROMETHEUS"
        )
    return found


def promtool(*arguments: str) -> None:
    """Run it; an error fails the test."""
    done = subprocess.run([_program("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """Scrapes servers on this machine.

    Args:
        folder: For its configuration and data; made.
        ports: Of the servers.
        rules: File of alerts.
    """

    def __init__(self, folder: Path, ports: list[int], rules: Path) -> None:
        program = _program("prometheus")
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api/v1"
        targets = [f"127.0.0.1:{target}" for target in ports]
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(configuration))  # YAML, too
        self._command = [
            program, f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        self._log = folder / "log"

    def __enter__(self) -> Prometheus:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.query("up")
                return self
            except OSError:
                ended = self._process.poll() is not None or time.monotonic() > deadline
                assert not ended, self._log.read_text()
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> Any:
        """The answer at this moment; what is no query raises ``HTTPError``."""
        return self._get(f"query?{urllib.parse.urlencode({'query': expression})}")

    def rules(self) -> list[Any]:
        """The rules as they were last evaluated."""
        groups = self._get("rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as response:
            return json.load(response)
