# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The registry of arms: names, settings, labels, groups."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import arms, harness

FORCED = {"init_blocks": 1, "local_blocks": 2, "dense_len": 0}
PROMPTS = {**FORCED, "top_k": 32}
EVERY = {**FORCED, "selector": "query", "top_k": 8, "dense_len": 1 << 30}


@pytest.mark.parametrize(
    ("name", "backend", "settings"),
    [
        ("rocket-512", "ROCKETKV", {"token_budget": 512}),
        ("rocketkv-512", "ROCKETKV", {"token_budget": 512}),
        ("page1-256", "ROCKETKV", {"token_budget": 256, "page_sizes": [1]}),
        ("quest-256", "QUEST", {"token_budget": 256}),
        ("snapkv-1024", "SNAPKV", {"token_budget": 1024}),
        ("streamingllm-512", "STREAMINGLLM", {"token_budget": 512}),
        ("lookahead-16", "SPARDA", {**FORCED, "top_k": 16, "selector": "lookahead-query"}),
        ("sparda-96-local-32", "SPARDA", {**FORCED, "top_k": 96, "local_blocks": 32}),
        ("sparse-dense", "SPARDA", EVERY),
        ("prompts-64", "SPARDA", {**PROMPTS, "sparse_prefill": 64, "selector": "query"}),
        (
            "prompts-lookahead-64",
            "SPARDA",
            {**PROMPTS, "sparse_prefill": 64, "selector": "lookahead-query"},
        ),
    ],
)
def test_a_name_says_backend_and_settings(name, backend, settings):
    arm = arms.parse_arm(name)
    assert (arm.name, arm.backend, arm.settings) == (name, backend, settings)


def test_stock_vllm_has_no_settings_and_may_come_twice():
    for name in ("dense", "dense-again"):
        assert arms.parse_arm(name, {"min_context": 5}).settings is None
        assert arms.parse_arm(name).engine_args({"kv_cache_memory_bytes": 1}) == {}


def test_an_arm_may_have_an_fp8_cache():
    arm, plain = arms.parse_arm("rocketkv-512+fp8"), arms.parse_arm("rocketkv-512")
    assert arm.settings == plain.settings
    assert arm.engine_args({}) == {**plain.engine_args({}), "kv_cache_dtype": "fp8"}
    assert arms.parse_arm("dense+fp8").engine_args({}) == {"kv_cache_dtype": "fp8"}
    assert arms.label("dense+fp8") == "stock (dense), fp8"


@pytest.mark.parametrize("name", ["rocket", "rocket-x", "512", "rocket-512-local-3", "sparda", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="unknown arm"):
        arms.parse_arm(name)


def test_an_arm_takes_the_settings_that_its_backend_has():
    given = {"min_context": 64, "local_blocks": 4, "token_budget": 1}
    assert arms.parse_arm("rocket-512", given).settings == {"min_context": 64, "token_budget": 512}
    assert arms.parse_arm("query-8", given).settings["local_blocks"] == 4
    with pytest.raises(ValueError, match="no backend has a setting 'colour'"):
        arms.parse_arm("rocket-512", {"colour": 1})


def test_forecast_arms_need_weights():
    for name in ("forecast-16", "prompts-forecast-32"):
        with pytest.raises(ValueError, match="--forecast"):
            arms.parse_arm(name)
    assert arms.parse_arm("forecast-16", forecast="f").settings["forecast"] == "f"


def test_the_host_pool_of_sparda_is_as_large_as_stocks():
    own = arms.parse_arm("query-8").engine_args({"kv_cache_memory_bytes": 2 << 30})
    assert own["attention_backend"] == "SPARDA"
    assert own["additional_config"]["vllm_sparse"]["host_gib"] == 2


def test_the_policies_are_compared_at_three_budgets():
    names = arms.GROUPS["policies"]
    assert names[0] == "dense"
    assert len(names) == 13
    parsed = [arms.parse_arm(name) for name in names]
    assert {arm.backend for arm in parsed[1:]} == {"ROCKETKV", "QUEST", "SNAPKV", "STREAMINGLLM"}
    assert {arm.settings["token_budget"] for arm in parsed[1:]} == {256, 512, 1024}


@pytest.mark.parametrize("group", arms.GROUPS)
def test_every_group_is_made_of_known_arms(group):
    assert all(arms.parse_arm(name).label for name in arms.GROUPS[group])


def test_labels_are_for_tables():
    assert arms.label("rocket-512") == "t = 512"
    assert arms.label("forecast-16") == "`forecast`, 16"
    assert arms.label("something else") == "something else"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arms.add_options(parser, "dense,rocket-512")
    return parser, parser.parse_args(arguments)


def test_groups_stand_for_their_arms_on_the_command_line(capsys):
    found = arms.parse_arms(*options("--arms", "policies"), {"min_context": 1024}, baseline=True)
    assert [arm.name for arm in found] == list(arms.GROUPS["policies"])
    assert found[1].settings["min_context"] == 1024
    with pytest.raises(SystemExit):
        arms.parse_arms(*options("--arms", "rocket-512,dense"), baseline=True)
    assert "the first arm must be dense" in capsys.readouterr().err


def test_presets_and_quick_are_defaults_that_options_override():
    parser = harness.parser("tried", "about", "small")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--preset")
    presets = {"some": {"questions": 7}}

    def questions(*arguments: str) -> int:
        return harness.parse(parser, list(arguments), {"questions": 4}, presets).questions

    assert questions("--quick", "--questions", "3") == 3
    assert questions("--preset", "some", "--questions", "5") == 5
