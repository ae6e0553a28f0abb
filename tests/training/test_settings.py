# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Recipes and settings."""

from __future__ import annotations

import pytest
from support.training import SETTINGS

from vllm_sparse.config import read_values, shipped_names
from vllm_sparse.errors import ConfigError
from vllm_sparse.training.settings import RECIPES, TrainSettings, load_train_settings


def test_recipes_are_valid():
    assert shipped_names(RECIPES) == ["dense", "dense-small", "sparda"]
    for name in shipped_names(RECIPES):
        load_train_settings(name, {})
    published = load_train_settings("sparda", {})
    assert published == TrainSettings(init="uniform")
    assert published.geometry.free_picks == 62
    # What is served without training, and the least that is advised where exact strings matter.
    served = read_values("preset", "qwen2.5-sparda", "vllm_sparse.configs", "config")
    trained = load_train_settings("dense", {}).model_dump()
    names = ("block_size", "init_blocks", "local_blocks", "top_k")
    assert {name: trained[name] for name in names} == {name: served[name] for name in names}


def test_learning_rate():
    linear = TrainSettings(**{**SETTINGS, "schedule": "linear", "warmup_steps": 2, "lr": 1.0})
    assert [linear.learning_rate(step) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    constant = TrainSettings(**SETTINGS)
    assert {constant.learning_rate(step) for step in range(4)} == {SETTINGS["lr"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 6144}, "too short"),
        ({"top_k": 34}, "leaves nothing to choose"),
        ({"block_size": 48}, "not a multiple"),
        ({"teacher": "mean"}, "teacher"),
        ({"typo": 1}, "typo"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_train_settings(None, changes)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="dense, dense-small, sparda"):
        load_train_settings("sparta", {})
