# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a ``config.json`` says to vLLM: with what it leaves out and the model's class knows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from vllm_sparse import paths
from vllm_sparse.errors import ConfigError

_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "num_key_value_heads", "intermediate_size", "max_position_embeddings",
)  # fmt: skip
# Names that a class may derive, or map to others of its own, so that its dictionary lacks them.
_DERIVED = (*_SIZES, "layers_block_type")
# With these sizes their files say all that is asked: the classes take longer to load than torch.
_PLAIN = ("llama", "qwen2", "qwen3", "qwen3_moe")


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``, whose ``text_config`` is the whole part about the language model.

    Args:
        path: Of the file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object; is it a model's config.json?")
    return {**config, "text_config": _by_class(config) or config.get("text_config") or {}}


def _by_class(config: dict[str, Any]) -> dict[str, Any] | None:
    """The part about the language model as transformers has it, without code of the model's own.

    ``None`` where the file is enough, or where there is no such class.
    """
    kind, windows = config.get("model_type"), config.get("sliding_window")
    alike = not windows or config.get("use_sliding_window") is False
    if kind is None or (kind in _PLAIN and alike and all(map(config.get, _SIZES))):
        return None
    try:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()  # keys that it does not know, and the like
        given = {key: value for key, value in config.items() if key != "model_type"}
        found = transformers.AutoConfig.for_model(kind, **given).get_text_config()
        derived = {key: getattr(found, key, None) for key in _DERIVED}
    except Exception:  # not installed, unknown to it, or refused by its own checks
        return None
    return found.to_dict() | {key: value for key, value in derived.items() if value is not None}


def find_config(name: str) -> Path:
    """The ``config.json`` of a name; see :func:`vllm_sparse.planner.model.read_model`.

    Raises:
        ConfigError: There is none on this machine.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    cached = paths.hub_cache() / f"models--{name.replace('/', '--')}"
    newest = sorted(cached.glob("snapshots/*/config.json"), key=lambda file: file.stat().st_mtime)
    for found in (path / "config.json", paths.cache_dir() / name / "config.json", *newest[-1:]):
        if found.is_file():
            return found
    raise ConfigError(
        f"no config.json of {name!r} on this machine: it is neither a file nor a folder, and "
        f"neither {paths.cache_dir()} nor {cached.parent} has it. If it is a name of the Hugging "
        f"Face hub, `hf download {name} config.json` fetches that one file; else give the path of "
        "the model's config.json"
    )
