# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A model that is a ``config.json`` only."""

from __future__ import annotations

import json

import pytest
from support.planner import LLAMA


@pytest.fixture
def config(tmp_path):
    """Writes a Llama of 8 billion parameters with changes, and returns the path."""

    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**LLAMA, **changes}))
        return str(path)

    return write
