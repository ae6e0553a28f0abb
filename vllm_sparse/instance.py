# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What start-up notes on vLLM's configuration, for all processes and views of one server.

A model of several parts is built under views of the configuration, and an engine completes its own
once more when it has started: both give `instance_id` a new value and ask start-up again. All of
them have one `compilation_config`, which travels with the configuration. In `additional_config`,
which vLLM hashes, a name would cost the cache of compiled models in every start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4


@dataclass
class Instance:
    """One server, or one ``LLM``.

    Attributes:
        name: Nobody else's; of the folder with its counters.
        sized_blocks: Blocks of the pool that start-up has sized; ``None``: it has sized nothing.
    """

    name: str = field(default_factory=lambda: uuid4().hex)
    sized_blocks: int | None = None


def instance_of(config: Any) -> Instance:
    """The instance that a configuration of vLLM's, or a view of it, belongs to.

    Args:
        config: vLLM's; start-up asks first, before other processes get theirs.
    """
    noted = config.compilation_config
    if not hasattr(noted, "_vllm_sparse"):
        noted._vllm_sparse = Instance()
    found: Instance = noted._vllm_sparse
    return found
