# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Recipes and settings."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from support.training import SETTINGS

from vllm_sparse.config import shipped_names
from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.weights import check_metadata
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.training.settings import RECIPES, TrainSettings, load_train_settings


def test_recipes_are_valid():
    assert shipped_names(RECIPES) == ["dense", "dense-small", "sparda", "sparse-small"]
    for name in shipped_names(RECIPES):
        load_train_settings(name, {})
    published = load_train_settings("sparda", {})
    assert published == TrainSettings(init="uniform")
    assert published.geometry.free_picks == 62


@pytest.mark.parametrize("recipe", shipped_names(RECIPES))
def test_what_a_recipe_trains_can_be_served_by_default(recipe):
    """More blocks than it was trained with, at most, which a server warns of."""
    trained, served = load_train_settings(recipe, {}).geometry, SpardaSettings()
    assert trained.top_k <= served.blocks_read
    counts = {name: str(value) for name, value in asdict(trained).items()}
    warning = check_metadata(counts, served)
    assert (warning is None) == (trained.top_k == served.blocks_read)


def test_the_recipe_for_sparse_prompts_is_the_small_one_but_for_what_it_is_for():
    dense, sparse = (load_train_settings(f"{kind}-small", {}) for kind in ("dense", "sparse"))
    changes = {
        "seq_len": 8192, "max_sequences": 32, "top_k": 32, "sparse_forward": True,
        "tail_queries": 128,
    }  # fmt: skip
    assert sparse == dense.model_copy(update=changes)
    assert not dense.sparse_forward
    history = sparse.history(sparse.steps)
    assert history["sparse_forward"] is True


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
    with pytest.raises(ConfigError, match="dense, dense-small, sparda, sparse-small"):
        load_train_settings("sparta", {})
