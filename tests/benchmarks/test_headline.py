# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What README says about the results."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from benchmarks import arms, headline, published, results
from vllm_sparse.policies.rocketkv import RocketKVSettings


def test_a_command_writes_the_file_that_its_line_was_read_from(monkeypatch):
    read = []
    right = published.result
    monkeypatch.setattr(published, "result", lambda name: read.append(name) or right(name))
    lines = headline.main().splitlines()[2:]
    assert len(lines) > 3
    for line in lines:
        command = re.search(r"`(python -m benchmarks\.(\w+)[^`]*)` \|$", line)
        typed, _, out = command[1].partition(" --out ")
        out = Path(out or f"benchmarks/results/{command[2]}.json")
        assert out.parent == results.FOLDER.relative_to(results.FOLDER.parents[1])
        assert out.stem in read
        made = re.sub(r" --out \S+", "", right(out.stem)["environment"]["command"])
        assert made == typed.removesuffix(" --setting window=32")


def test_a_command_measures_the_window_that_its_line_names():
    (line,) = (line for line in headline.main().splitlines() if "the paper's window" in line)
    words = shlex.split(re.search(r"`python -m benchmarks\.accuracy ([^`]*)`", line)[1])
    parser = argparse.ArgumentParser()
    arms.add_options(parser, "dense")
    options, _ = parser.parse_known_args(words)
    found = {arm.name: arm.settings for arm in arms.parse_arms(parser, options, {})}
    assert RocketKVSettings(**found["rocket-256"]).window == 32


def test_a_line_names_the_window_that_was_measured(monkeypatch):
    right = published.result

    def later(name):
        found = right(name)
        found["environment"]["date"] = "2026-12-24 18:00 UTC"
        return found

    monkeypatch.setattr(published, "result", later)
    assert "| ROCKETKV, t = 256, window 16: multi-key" in headline.main()
    assert "--setting" not in headline.main()
