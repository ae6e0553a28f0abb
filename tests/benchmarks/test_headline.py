# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What README says about the results."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import headline, published, results


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
        assert made == typed
