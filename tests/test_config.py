# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Settings: forms, presets, and errors that name the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_sparse import config
from vllm_sparse.config import PRESETS, load_settings, shipped_names
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies.rocketkv import RocketKVSettings
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.registry import entries, settings_class


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
    assert "llama-3.1-8b" in shipped_names(PRESETS)
    assert "smollm2-135m" in shipped_names(PRESETS)
    algorithms = {
        "minicpm4.1-8b": "sparda",
        "qwen2.5-sparda": "sparda",
        "smollm2-135m-sparda": "sparda",
    }
    for name in shipped_names(PRESETS):
        algorithm = algorithms.get(name, "rocketkv")
        chosen = load_settings({"vllm_sparse": {"config": name}}, algorithm)
        assert chosen.algorithm == algorithm
    assert load({"config": "smollm2-135m", "token_budget": 77}).token_budget == 77


@pytest.mark.parametrize("name", [name for name in shipped_names(PRESETS) if "sparda" in name])
def test_no_preset_reads_fewer_blocks_than_the_default(name):
    """Fewer lose points on models that were not trained for it."""
    chosen = load_settings({"vllm_sparse": {"config": name}}, "sparda")
    assert chosen.blocks_read >= SpardaSettings().blocks_read


def test_presets_that_are_said_to_change_nothing_do_not():
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    told = re.search(r"((?:`[^`]+`(?:, | and )?)+) have every default", page)
    names = re.findall(r"`([^`]+)`", told[1])
    plain = {name for name in shipped_names(PRESETS) if "sparda" not in name and "cpm" not in name}
    assert set(names) == {name for name in plain if load({"config": name}) == load({})}


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


ALGORITHMS = [name.lower() for name in entries()]
FIELDS = {name: [*settings_class(name).model_fields, "config", "other"] for name in ALGORITHMS}
# What JSON on a command line can be: numbers of any size, NaN, and whatever a typing mistake makes.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-4, 300), st.floats(), st.text(),
    st.sampled_from([2**31, 1e308, "64", "nan", "x" * 5000, "\0", "/dev/null", ".", "true"]),
)  # fmt: skip
JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_value_passes_by_accident(data):
    """A wrong one is refused by its name; what is accepted, kernels can count."""
    algorithm = data.draw(st.sampled_from(ALGORITHMS))
    field = st.sampled_from(FIELDS[algorithm])
    section = data.draw(st.dictionaries(field, JSON, min_size=1, max_size=2))
    loaded, message = None, ""
    try:
        loaded = load_settings({"vllm_sparse": section}, algorithm)
    except ConfigError as error:
        message = str(error)
    if loaded is None:
        assert any(name in message for name in section)
        return
    assert "other" not in section
    for value in dict(loaded).values():
        for number in value if isinstance(value, tuple) else (value,):
            assert not isinstance(number, int | float) or abs(number) < 2**31


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_a_config_that_is_no_mapping_is_refused(value):
    if value is None or isinstance(value, dict):
        return
    with pytest.raises(ConfigError, match="--additional-config"):
        load_settings(value, "rocketkv")
    with pytest.raises(ConfigError, match="vllm_sparse: expected a mapping"):
        load_settings({"vllm_sparse": value}, "rocketkv")


@pytest.mark.parametrize("content", [b"token_budget: [", b"\xff\xfe\x00", b"[" * 1000, b"7", b""])
def test_a_broken_preset_file_is_named(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"vllm_sparse.config.*mine\.yaml"):
        load({"config": str(path)})


@pytest.mark.parametrize(
    ("name", "backend"), [("RocketKVSettings", "rocketkv"), ("SpardaSettings", "sparda")]
)
def test_settings_that_moved_are_found_where_they_were_and_say_where_they_are(name, backend):
    kind = settings_class(backend)
    with pytest.warns(DeprecationWarning, match=f"is now {kind.__module__}.{name}"):
        assert getattr(config, name) is kind
    with pytest.raises(AttributeError, match="no attribute 'QuestSettings'"):
        config.QuestSettings  # noqa: B018
