# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The sizing page: what it asks, what it shows, and, where there is Chromium, the page itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_sparse.planner.commands import ALL_FRAMES
from vllm_sparse.planner.devices import DEVICES
from vllm_sparse.planner.model import Model
from vllm_sparse.planner.plan import Question, answer

DOCS = Path(__file__).parents[2] / "docs"
NODE = shutil.which("node")
CHROMIUM = next(
    filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "google-chrome"))]),
    None,
)
SHOW = """
const page = require("./plan_page.js"), plan = require("./plan.js");
const said = JSON.parse(require("fs").readFileSync(0, "utf8")).map((text) => {
  const state = page.parse(text), question = page.questionOf(state);
  return {
    said: page.said(state), question, chart: page.chartOf(question),
    table: page.tableOf(plan.answer(question)),
  };
});
console.log(JSON.stringify(said));
"""
ASKED = "context=16384&concurrency=4&device=a100&memory=40"
MOVED = """<script>
const slider = document.getElementById("concurrency-slider");
slider.value = 2;
slider.dispatchEvent(new Event("input", { bubbles: true }));
</script>"""
CELL = re.compile(r'data-arm="([^"]+)" data-key="([^"]+)"(?: data-value="([^"]*)")?>')


def show(*addresses):
    done = subprocess.run(
        [NODE, "-e", SHOW], cwd=DOCS / "javascripts", input=json.dumps(addresses),
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cells(html):
    return {(arm, key): value for arm, key, value in CELL.findall(html)}


def expected():
    """What the command says to `ASKED` of the page's first model."""
    (shown,) = show("") if NODE else ({},)
    config = shown["question"]["config"]
    question = Question(
        Model(Path("/nowhere"), config, 16384 + 256), "Llama-3.1-8B", 16384, 256, 4,
        DEVICES["a100"], 40 << 30, 256 << 30,
    )  # fmt: skip
    return [answer(question, name) for name in ("dense", "ROCKETKV", "SPARDA")]


def check(found, arms):
    for arm in arms:
        assert not arm.refused
        for key in ("request_bytes", "request_blocks", "pool_bytes", "host_bytes", "fits"):
            assert found[arm.name, key] == str(getattr(arm, key)), (arm.name, key)
        assert float(found[arm.name, "step_ms"]) == pytest.approx(arm.step_ms, rel=1e-12)


@pytest.mark.skipif(NODE is None, reason="needs node")
class TestWithoutABrowser:
    def test_the_table_shows_the_command_s_numbers(self):
        (shown,) = show(f"#{ASKED}")
        check(cells(shown["table"]), expected())
        assert shown["said"] == ASKED

    def test_anything_may_be_typed(self):
        odd = (
            "context=&memory=abc",
            "concurrency=-3&ranks=0",
            "model=nothing&device=x",
            "blocks=1",
        )
        for shown in show(*odd, "num_hidden_layers=2&head_dim=32", "model=<b>"):
            assert "NaN" not in shown["chart"] + shown["table"]
            assert "<b>" not in shown["table"]
            assert shown["question"]["concurrency"] >= 1

    def test_where_every_block_has_a_frame_it_says_what_that_means(self):
        saves, not_here = show("context=65536", "context=16384")
        for shown, said in ((saves, False), (not_here, True)):
            assert (ALL_FRAMES in shown["table"]) == said

    def test_a_refusal_is_said(self):
        (shown,) = show("model=SmolLM2-135M&context=32768")
        assert "ROCKETKV refuses this" in shown["table"]
        assert "dense refuses this" in shown["table"]
        (longer,) = show("model=SmolLM2-135M&context=32768&max_position_embeddings=33024")
        assert "max_position_embeddings" in shown["table"]
        assert "refuses this" not in longer["table"]
        assert cells(shown["table"])["ROCKETKV", "fits"] == ""

    def test_the_chart_names_its_lines_and_stays_in_its_frame(self):
        (shown,) = show("")
        for name in ("dense", "ROCKETKV", "SPARDA"):
            assert f">{name}</text>" in shown["chart"]
        points = re.findall(
            r"([\d.-]+),([\d.-]+)", " ".join(re.findall(r'points="([^"]+)"', shown["chart"]))
        )
        assert len(points) > 100
        assert all(0 <= float(x) <= 640 and 0 <= float(y) <= 280 for x, y in points)

    def test_every_field_of_the_form_is_asked(self):
        fields = set(re.findall(r'name="(\w+)"', (DOCS / "plan.md").read_text()))
        changed = "&".join(f"{name}=7" for name in sorted(fields - {"model", "device"}))
        (shown,) = show(changed)
        assert set(re.findall(r"(\w+)=", shown["said"])) == fields - {"model", "device"}


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None or NODE is None, reason="needs Chromium (or CHROMIUM) and node"
)
def test_a_browser_shows_the_command_s_numbers(tmp_path):
    text = (DOCS / "plan.md").read_text()
    (tmp_path / "javascripts").symlink_to(DOCS / "javascripts")
    # The form and what follows it are HTML already. One answer comes from the address, one from
    # a slider that somebody moves.
    body = text[text.index("<form") : text.index("## What the numbers mean")]
    (tmp_path / "plan.html").write_text(f"<!doctype html><meta charset=utf-8>{body}{MOVED}")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
            "--dump-dom", f"file://{tmp_path}/plan.html#{ASKED.replace('&concurrency=4', '')}",
        ],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(cells(done.stdout), expected())
    assert "<svg" in done.stdout
