# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A process dies in the middle of answers: what clients see, and what is left."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks import servers
from benchmarks.soak import watch
from benchmarks.soak.traffic import Ask

if TYPE_CHECKING:
    from benchmarks.soak.client import Answer, Client
    from benchmarks.soak.storm import Findings, Target

CLIENTS = 4
VICTIMS = ("worker", "engine")
END_S = 60  # for a client to be told, and for what is left of the server to end
_TOKENS = 1200


def kill_amid_answers(target: Target, leader: int, victim: str, findings: Findings) -> None:
    """Kills a process of a server while it answers, and notes what goes wrong then.

    Args:
        target: The server.
        leader: Its API server's process.
        victim: One of `VICTIMS`.
        findings: Is added to.
    """
    asks = [Ask(tuple(range(5 + i, 300 + i)), _TOKENS) for i in range(CLIENTS)]
    process = watch.processes(leader)[victim]
    where = f"after kill -9 of the {victim}"
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(_until_told, target.client, ask) for ask in asks]
        if not watch.until(lambda: target.metrics()[servers.RUNNING] > 0, END_S, 0.1):
            findings.faults.append(f"{where}: nothing ever ran")
        time.sleep(0.5)  # some tokens have been sent
        files = watch.files_of(leader)
        watch.kill(process)
        begin = time.monotonic()
        for answer in answers:
            try:
                got = answer.result(timeout=max(0.0, begin + END_S - time.monotonic()))
            except TimeoutError:
                findings.faults.append(f"{where}: a client hangs for {END_S} s")
                _end_group(leader)  # or this program would hang with it
                continue
            findings.counts[f"clients told {where}"] += 1
            findings.counts[f"answers cut short {where}"] += any(got.tokens)
            findings.seen.add(f"{victim}: {got.error[:100]}")
    if not watch.until(lambda: not watch.group(leader), END_S):
        findings.faults.append(f"{where}: processes {watch.group(leader)} live on")
        _end_group(leader)
    left = watch.left_behind(files)
    findings.counts[f"files gone {where}"] += len(files) - len(left)
    findings.faults += [f"{where}, left behind: {path}" for path in left]


def _until_told(client: Client, ask: Ask) -> Answer:
    """Asks again and again: an engine may be whole answers ahead of what clients have read."""
    while not (answer := client.complete(ask)).error:
        pass
    return answer


def _end_group(leader: int) -> None:
    for pid in watch.group(leader):
        os.kill(pid, signal.SIGKILL)
