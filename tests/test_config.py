# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Settings: forms, presets, and errors that name the key."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vllm_sparse.config import load_settings, preset_names
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies.rocketkv import RocketKVSettings


def load(section):
    return load_settings({"vllm_sparse": section}, "rocketkv")


def test_defaults_need_no_section():
    assert load_settings({}, "rocketkv") == load_settings(None, "rocketkv") == RocketKVSettings()


def test_values_given_as_text_are_parsed():
    """The dotted command-line form may hand over text."""
    assert load({"token_budget": "512", "stage2": "false"}).token_budget == 512


@pytest.mark.vllm
def test_both_command_line_forms_arrive():
    utils = pytest.importorskip("vllm.utils.argparse_utils")
    from vllm.engine.arg_utils import EngineArgs

    parser = EngineArgs.add_cli_args(utils.FlexibleArgumentParser())
    forms = (
        ["--additional-config", '{"vllm_sparse": {"token_budget": 640, "stage2": false}}'],
        [
            "--additional-config.vllm_sparse.token_budget=640",
            "--additional-config.vllm_sparse.stage2=false",
        ],
    )
    for arguments in forms:
        given = parser.parse_args(arguments).additional_config
        loaded = load_settings(given, "rocketkv")
        assert (loaded.token_budget, loaded.stage2) == (640, False), arguments


def test_page_sizes_are_sorted_and_unique():
    assert load({"page_sizes": [4, 2, 4]}).page_sizes == (2, 4)


def test_every_preset_is_valid_and_keys_beside_it_win():
    assert "llama-3.1-8b" in preset_names()
    assert "smollm2-135m" in preset_names()
    algorithms = {
        "minicpm4.1-8b": "sparda",
        "qwen2.5-sparda": "sparda",
        "smollm2-135m-sparda": "sparda",
    }
    for name in preset_names():
        algorithm = algorithms.get(name, "rocketkv")
        chosen = load_settings({"vllm_sparse": {"config": name}}, algorithm)
        assert chosen.algorithm == algorithm
    assert load({"config": "smollm2-135m", "token_budget": 77}).token_budget == 77


def test_a_preset_can_be_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("token_budget: 640\n")
    assert load({"config": str(path)}).token_budget == 640


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        RocketKVSettings().token_budget = 3


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ({"token_budgt": 512}, ["vllm_sparse.token_budgt", "unknown setting", "token_budget"]),
        ({"token_budget": "many"}, ["vllm_sparse.token_budget", "integer"]),
        ({"token_budget": 8}, ["vllm_sparse.token_budget", "16"]),
        ({"pool_kernel": 4}, ["vllm_sparse.pool_kernel", "even"]),
        ({"page_sizes": [3]}, ["vllm_sparse.page_sizes", "power of two"]),
        ({"page_sizes": []}, ["vllm_sparse.page_sizes"]),
        ({"token_budget": 16, "page_sizes": [8]}, ["token_budget=16", "page_sizes"]),
        ({"stage1": False, "stage2": False}, ["stage1", "stage2", "dense attention"]),
        ({"window": 0}, ["vllm_sparse.window"]),
        ({"algorithm": "sparda"}, ["vllm_sparse.algorithm", "rocketkv"]),
        ({"config": "nope"}, ["vllm_sparse.config", "nope", "llama-3.1-8b"]),
        ("text", ["vllm_sparse", "mapping"]),
    ],
)
def test_errors_name_the_key(section, names):
    with pytest.raises(ConfigError) as error:
        load(section)
    for name in names:
        assert name in str(error.value)


def test_a_misspelt_section_is_noticed():
    with pytest.raises(ConfigError, match="should be 'vllm_sparse'"):
        load_settings({"vllm-sparse": {}}, "rocketkv")
