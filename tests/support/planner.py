# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans of a model that is a ``config.json`` only."""

from __future__ import annotations

import json

from vllm_sparse.cli import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


def plan(capsys, *options):
    """Exit status, and what is said of each backend."""
    status = main(["plan", *options, "--json", "--host-memory", "512"])
    return status, {arm["name"]: arm for arm in json.loads(capsys.readouterr().out)["arms"]}
