# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where files are kept between runs, and writing them so that no half of one is left."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE_ENV = "VLLM_SPARSE_CACHE"


def cache_dir() -> Path:
    """``$VLLM_SPARSE_CACHE``, or ``~/.cache/vllm-sparse``: for what can be made again."""
    configured = os.environ.get(CACHE_ENV)
    return Path(configured) if configured else Path.home() / ".cache" / "vllm-sparse"


def hub_cache() -> Path:
    """Where ``hf download`` and vLLM keep what they fetch from the Hugging Face hub."""
    get = os.environ.get
    home = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(hub)).expanduser()


def hub_snapshot(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model's files in that cache, which need not be all of them.

    Args:
        name: As the hub has it.
        revision: A branch, a tag or a commit; the branch ``main`` by default.
    """
    cached = hub_cache() / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    reference = cached / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    found = cached / "snapshots" / commit
    return found if found.is_dir() else None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)  # safetensors lets only the owner read
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
