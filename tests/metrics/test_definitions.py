# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What code counts, what is defined, and what dashboard, alerts and pages name are the same."""

from __future__ import annotations

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.policies import make_policy

from scripts.pages import metrics as pages
from vllm_sparse.metrics.definitions import METRICS, PREFIX
from vllm_sparse.registry import load

ROOT = Path(__file__).parents[2]
COUNTING = re.compile(r"count|self\._?count|(metrics\.)?counters(\(\))?\.(add|set_gauge)")
DERIVED = {"bucket", "sum", "count", "total", "created"}


def _counted() -> set[str]:
    """Names that code counts by, wherever they stand."""
    texts = set()
    for path in (ROOT / "vllm_sparse").rglob("*.py"):
        if path.name == "definitions.py":
            continue
        tree = ast.parse(path.read_text())
        texts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return texts & set(METRICS)


def _calls() -> set[str]:
    """Names that functions which count are called with."""
    found = set()
    for path in (ROOT / "vllm_sparse").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            if COUNTING.fullmatch(ast.unparse(node.func)) and isinstance(
                node.args[0], ast.Constant
            ):
                found.add(node.args[0].value)
    return found


def test_what_is_defined_is_counted():
    assert _counted() == set(METRICS)


def test_what_is_counted_is_defined():
    assert _calls() <= set(METRICS)
    assert len(_calls()) > 10


@pytest.mark.parametrize("name", ["rocketkv:RocketKV", "snapkv:SnapKV", "quest:Quest"])
def test_reasons_are_defined(name):
    policy = make_policy(load(f"vllm_sparse.policies.{name}"))
    given = {policy.retention(n).reason for n in range(policy.shape.max_model_len)} - {""}
    assert given
    assert given <= {reason.value for reason in METRICS["dense_fallbacks"].reasons}


def test_names_are_as_prometheus_wants_them():
    for metric in METRICS.values():
        assert re.fullmatch(r"vllm:[a-z_]+", metric.series)
        assert metric.series.endswith("_total") != metric.gauge
        if metric.unit in ("bytes", "seconds"):
            assert metric.name.endswith(f"_{metric.unit}"), "units stand in names"


def queries() -> dict[str, str]:
    """Every query of the dashboard and the alerts, by where it stands."""
    found = {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in pages.dashboard()
        for target in panel["targets"]
    }
    return found | {rule["alert"]: rule["expr"] for rule in pages.rules()}


def _names_of_vllm() -> set[str]:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM's names are looked up in its sources")
    sources = Path(spec.origin).parent.glob("v1/**/metrics/*.py")
    return set(re.findall(r"\"(vllm:\w+)\"", "".join(path.read_text() for path in sources)))


@pytest.mark.parametrize("where", queries())
def test_queries_name_metrics_that_there_are(where):
    used = set(re.findall(r"vllm:\w+", queries()[where]))
    assert used
    for name in used:
        if name.startswith(PREFIX):
            assert name in {metric.series for metric in METRICS.values()}
        else:
            stem, _, end = name.rpartition("_")
            assert ({name, stem} if end in DERIVED else {name}) & _names_of_vllm()


def test_every_metric_is_on_the_dashboard():
    text = " ".join(queries().values())
    assert not [m.series for m in METRICS.values() if not re.search(rf"{m.series}\b", text)]


def test_the_dashboard_is_one():
    """What a Grafana would trip over: ids that repeat, panels that overlap, variables unknown."""
    board = json.loads(pages.DASHBOARD.read_text())
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    variables = {f"${variable['name']}" for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\w+", " ".join(queries().values())))
    assert used <= variables | {"$__rate_interval", "$labels"}
    assert all(panel["description"] for panel in pages.dashboard())
