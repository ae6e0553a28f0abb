# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Names, and policies of other packages."""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.outside import LargeKeys, LargeKeysSettings

from vllm_sparse import registry
from vllm_sparse.config import load_settings
from vllm_sparse.errors import ConfigError


@pytest.fixture
def outside(monkeypatch):
    """Pretend that packages with these entry points are installed."""

    def install(*points: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in points]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        registry.entries.cache_clear()

    yield install
    monkeypatch.undo()
    registry.entries.cache_clear()


def test_every_name_has_settings_and_adapters():
    assert {"ROCKETKV", "SPARDA", "QUEST", "SNAPKV", "STREAMINGLLM"} <= registry.entries().keys()
    for name in registry.entries():
        settings = registry.settings_class(name.lower())()
        assert settings.algorithm == name.lower()
        assert (registry.policy(name) is None) == (name == "SPARDA")


def test_policies_are_below_150_lines():
    """A policy is one file that a reader takes in at once."""
    import inspect

    for name in ("QUEST", "SNAPKV", "STREAMINGLLM"):
        source = inspect.getsource(inspect.getmodule(registry.policy(name)))
        assert len(source.splitlines()) < 150


def test_a_policy_of_another_package_is_found(outside):
    outside(("LARGEKEYS", "support.outside:LargeKeys"))
    assert registry.policy("LARGEKEYS") is LargeKeys
    loaded = load_settings({"vllm_sparse": {"token_budget": 64}}, "largekeys")
    assert isinstance(loaded, LargeKeysSettings)
    with pytest.raises(ConfigError, match="unknown setting"):
        load_settings({"vllm_sparse": {"page_sizes": [4]}}, "largekeys")


@pytest.mark.parametrize(
    ("name", "why"), [("QUEST", "is taken"), ("largekeys", "is not in capitals")]
)
def test_names_that_would_confuse_are_left_out_with_a_warning(outside, monkeypatch, name, why):
    said = []
    monkeypatch.setattr(registry.logger, "warning", lambda *text: said.append(text[0] % text[1:]))
    ours = registry.entries()
    outside((name, "support.outside:LargeKeys"))
    assert registry.entries() == ours
    assert why in said[0]
    assert name in said[0]


# Who else may spell names, and why.
ELSEWHERE = {
    "backends/sparda*.py": "SPARDA's own adapters",
    "config.py": "two settings classes that were once defined there",
    "features/*.py": "the families, one of which is called as its only backend",
    "forecast/*.py": "looks ahead for SPARDA alone",
    "metrics/definitions.py": "the type of a family; a Literal takes no names",
    "policies/*.py": "each its own, in its settings",
}


def test_one_place_knows_names():
    """Docstrings and messages aside, who needs to know asks the registry for a family."""
    package = Path(registry.__file__).parent
    names, spelt = registry._BUILT_IN.keys(), set()
    for path in package.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        if any(isinstance(x, ast.Constant) and str(x.value).upper() in names for x in nodes):
            spelt.add(path.relative_to(package))
    spelt.remove(Path("registry.py"))
    assert {path for path in spelt if not any(map(path.match, ELSEWHERE))} == set()
    assert [where for where in ELSEWHERE if not any(path.match(where) for path in spelt)] == []
