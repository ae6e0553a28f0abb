# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The servers that are soaked: as small as traffic can fill, with little to spare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.soak import probe
from benchmarks.soak.traffic import CROWD
from vllm_sparse.config import load_settings
from vllm_sparse.demo.server import Server
from vllm_sparse.kv.host.geometry import GIB, block_bytes, blocks_per_row

ROOT = Path(__file__).resolve().parents[2]
NAME = "soaked"
BLOCK_TOKENS = 32
AT_ONCE = CROWD  # requests in a step
_KV_HEADS, _HEAD_DIM, _LAYERS, _ITEM_BYTES = 2, 32, 3, 4  # of the checkpoint, in float32

_POLICY = {"token_budget": 128}
_SETTINGS: dict[str, dict[str, Any]] = {
    "ROCKETKV": {**_POLICY, "generation_reserve": 64},
    "QUEST": _POLICY,
    "SNAPKV": _POLICY,
    "STREAMINGLLM": _POLICY,
    "SPARDA": {
        "selector": "lookahead-query", "block_size": BLOCK_TOKENS, "kernel_stride": 16,
        "init_blocks": 1, "local_blocks": 1, "top_k": 6, "dense_len": 0, "staging_blocks": 4,
        "host_gib": 0.25, "poison": True,
    },
}  # fmt: skip
BACKENDS = tuple(_SETTINGS)


class Subject(NamedTuple):
    """What is served.

    Attributes:
        backend: Name; empty: stock.
        settings: Of the plugin.
        longest: Most tokens of a request.
        blocks: Of the pool.
        block_tokens: Of a block; empty: as vLLM chooses.
    """

    backend: str
    settings: dict[str, Any]
    longest: int
    blocks: int
    block_tokens: str = str(BLOCK_TOKENS)

    @property
    def dense_tokens(self) -> int:
        """Requests up to this many tokens, answer included, are served as stock vLLM does."""
        if self.backend != "SPARDA":
            return int(self.settings["min_context"])
        settings = load_settings({"vllm_sparse": self.settings}, "sparda")
        return int(settings.blocks_read * settings.block_size)


def subject(backend: str, longest: int, **changed: Any) -> Subject:
    """Returns a server with a pool that one of the longest requests fills.

    SPARDA's slab has not one frame more than start-up asks for.

    Args:
        backend: One of `BACKENDS`.
        longest: Most tokens of a request.
        **changed: Settings.
    """
    settings = {**_SETTINGS[backend], **changed}
    if backend != "SPARDA":
        settings.setdefault("min_context", longest // 8)  # a crowd's prompts keep their blocks
    blocks = longest // BLOCK_TOKENS + 8
    if backend == "SPARDA" and "slab_gib" not in settings:
        loaded = load_settings({"vllm_sparse": settings}, "sparda")
        frames = min(AT_ONCE * blocks_per_row(loaded, longest), blocks)
        frame_bytes = block_bytes(_LAYERS, _KV_HEADS, BLOCK_TOKENS, _HEAD_DIM, _ITEM_BYTES)
        settings["slab_gib"] = frames * frame_bytes / GIB
    return Subject(backend, settings, longest, blocks)


def server(
    model: Path,
    log: Path,
    subject: Subject,
    *further: str,
    kind: type[Server] = Server,
    **environment: str,
) -> Server:
    """Returns a server that answers to the probe, not yet started.

    Args:
        model: Folder of the checkpoint.
        log: Receives what it prints.
        subject: What is served.
        *further: Its options.
        kind: How it is started.
        **environment: Added to what all have.
    """
    arguments = [
        str(model), "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", str(subject.longest), "--max-num-seqs", str(AT_ONCE),
        "--max-num-batched-tokens", "1024",
        "--kv-cache-memory-bytes", str(1 << 28), "--num-gpu-blocks-override", str(subject.blocks),
        *PROBED, *further,
    ]  # fmt: skip
    if subject.block_tokens:
        arguments += ["--block-size", subject.block_tokens]
    if subject.backend:
        further = json.dumps({"vllm_sparse": subject.settings})
        arguments += ["--attention-backend", subject.backend, "--additional-config", further]
    return kind(arguments, log, environment={**ENVIRONMENT, **environment})


PROBED = ("--worker-extension-cls", probe.NAME)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_CI_ENV": "1", "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
