# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tables of the quality page: arms side by side are scored by the same questions."""

from __future__ import annotations

import re

import pytest

from benchmarks import published, results
from benchmarks.quality import pages, report


def answers(*scores):
    return {str(index): {"score": score, "reply": ""} for index, score in enumerate(scores)}


@pytest.fixture
def replies(monkeypatch):
    """One question more of dense than of the others."""
    arms = {
        name: {"4096": {"vt": answers(0.5, 0.5), "table": answers(0.0, 1.0)}}
        for name in {**pages.WINDOWS, **pages.EVERY}
    }
    arms["dense"]["4096"] = {"vt": answers(1.0, 1.0, 0.0), "table": answers(0.0, 1.0, 0.0)}
    monkeypatch.setattr(published, "result", lambda name: {"arms": arms})
    return arms


def test_only_shared_questions_count(replies):
    head, _, dense, *others = pages.scores(pages.WINDOWS).splitlines()
    assert head == "| arm | table (2) | vt (2) | mean | to dense, points (90 %) |"
    assert dense == "| dense | .50 | 1.00 | .750 | |"
    assert others[0] == "| window 32, t = 256 | .50 | .50 | .500 | -25.0 (-25.0 to -25.0) |"


def test_each_task_has_an_interval_of_its_own(replies):
    replies["exact-256"]["4096"]["table"] = answers(0.0, 0.5)
    head, _, exact, other, *_ = pages.by_task(pages.BY_TASK).splitlines()
    assert head == "| arm | table (2) | vt (2) |"
    assert exact == "| exact top-k, 256 tokens | -25 (-50 to +0) | -50 (-50 to -50) |"
    assert other == "| exact top-k, 1,024 tokens | 0 | -50 (-50 to -50) |"


def test_gains_are_paired(replies):
    replies["window16-512"]["4096"]["vt"] = answers(1.0, 1.0)
    *_, plain, gained, _ = pages.windows().splitlines()
    assert plain == "| 256 | no difference in 4 | no difference in 2 |"
    assert gained == "| 512 | +25.0 (+25.0 to +25.0) | +50.0 (+50.0 to +50.0) |"


def test_other_files_and_contexts(monkeypatch):
    arms = {name: {"8192": {"turns-kv": answers(0.0, 1.0)}} for name in ("dense", "quest-512")}
    found = {"quality-turns": {"arms": arms}}
    monkeypatch.setattr(published, "result", found.__getitem__)
    text = pages.scores({"dense": "dense", "quest-512": "QUEST"}, "quality-turns", "8192")
    assert text.splitlines()[0] == "| arm | turns-kv (2) | mean | to dense, points (90 %) |"
    assert text.splitlines()[-1] == "| QUEST | .50 | .500 | no difference in 2 |"


QUALITY = sorted(results.FOLDER.glob("quality-*.json"))


@pytest.mark.parametrize("file", QUALITY, ids=lambda file: file.stem)
def test_every_question_s_length_is_known(file):
    found = published.result(file.stem)
    asked = {
        (context, task, index)
        for cells in found["arms"].values()
        for context in filter(str.isdigit, cells)
        for task, answers in cells[context].items()
        for index in answers
    }
    noted = {
        (context, task, index)
        for context, tasks in found["questions"].items()
        for task, of_task in tasks.items()
        for index in of_task
    }
    assert asked == noted


def test_the_page_says_which_tasks_are_shorter_than_their_context():
    page = (results.FOLDER.parents[1] / "docs" / "quality.md").read_text()
    assert pages.short("quality-lab", "4096") == {"cwe", "niah_multikey_3"}
    assert pages.short("quality-8k", "8192") == {"cwe"}
    assert not pages.short("quality-turns", "8192")
    assert pages.short("quality-smollm2", "4096").isdisjoint(pages.SECOND_TASKS)
    for line in pages.sizes().splitlines():
        assert line in page


def test_no_published_arm_is_dense_under_another_name():
    for names, *where in (
        *((names, pages.FILE, pages.CONTEXT) for names in (pages.WINDOWS, pages.EVERY)),
        (pages.LONGER, "quality-8k", "8192"),
        (pages.SECOND, "quality-smollm2", pages.CONTEXT, pages.SECOND_TASKS),
        (pages.TURNS, "quality-turns", "8192"),
        (pages.STRIDES, "quality-strides", "8192"),
    ):
        for name, tasks in pages.scored(names, *where).items():
            stars = [report.mark(answers) for answers in tasks.values()]
            assert (name == "dense") == all(stars), name


def test_tasks_that_are_short_are_left_out_of_a_second_difference(replies, monkeypatch):
    lengths = {"vt": {"0": {"prompt_tokens": 3800}}, "table": {"0": {"prompt_tokens": 2000}}}
    found = {"arms": replies, "questions": {"4096": lengths}}
    monkeypatch.setattr(published, "result", lambda name: found)
    replies["paper-256"]["4096"]["vt"]["0"]["read_everything"] = True
    replies["paper-256"]["4096"]["vt"]["1"]["read_everything"] = True
    head, _, dense, first, *_ = pages.scores(pages.WINDOWS).splitlines()
    assert head.endswith("| to dense, points (90 %) | tasks of full length (1) |")
    assert dense.endswith("| .750 | | |")
    assert "| .50 | .50* |" in first
    assert first.endswith("| -25.0 (-25.0 to -25.0) | -50.0 (-50.0 to -50.0) |")


def test_the_readme_says_what_the_table_says():
    """Points from dense with the default window, in one sentence."""
    text = " ".join((results.FOLDER.parents[1] / "README.md").read_text().split())
    lines = pages.scores(pages.WINDOWS).splitlines()[4::2]
    assert len(lines) == len(pages.BUDGETS)
    for line in lines:
        budget, *points = re.search(
            r"window 16, t = (\d+) \|.* (\S+) \((\S+) to (\S+)\) \| [^|]+ \|$", line
        ).groups()
        centre, low, high = map(re.escape, points)
        told = rf"{centre} (points from dense )?with (t = )?{budget} \((90 %: )?{low} to {high}\)"
        assert re.search(told, text), told
    longer = pages.scores(pages.LONGER, "quality-8k", "8192").splitlines()
    for name, told in (
        ("ROCKETKV, t = 1024 (default)", "{} with 1024 ({} to {})"),
        ("ROCKETKV, t = 512", "{} with 512 ({} to {})"),
        ("SPARDA, `query`, 96", "{} at 8K ({} to {}; selector `query`"),
    ):
        (line,) = (line for line in longer if line.startswith(f"| {name} |"))
        points = re.search(r" (\S+) \((\S+) to (\S+)\) \| [^|]+ \|$", line).groups()
        assert told.format(*points) in text, name


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("choose", "512 is within a point at 4K and {} points below dense at 8K ({} to {};"),
        ("choose", "t = 512 is {} points below dense on eight tasks ({} to {}), 32 blocks {}"),
        ("quality", "t = 512 is {} points below dense ({} to {}), SPARDA with 32 blocks {}"),
    ],
)
def test_other_pages_say_what_the_table_says(page, told):
    text = " ".join((results.FOLDER.parents[1] / "docs" / f"{page}.md").read_text().split())
    found = pages.scored(pages.LONGER, "quality-8k", "8192")
    small, blocks = (
        report.lost_points([report.differences(of[task], found["dense"][task]) for task in of])
        for of in (found["window16-512"], found["query-32"])
    )
    lost, *bounds = small
    assert told.format(f"{-lost:.1f}", *(f"{x:+.1f}" for x in bounds), f"{-blocks[0]:.1f}") in text


def test_the_page_says_what_remains_without_the_task_that_dense_fails():
    page = (results.FOLDER.parents[1] / "docs" / "quality.md").read_text()
    found = pages.scored(pages.LONGER, "quality-8k", "8192")
    rest = [task for task in found["dense"] if task != "niah_multikey_3"]
    for name, told in (
        ("window16-1024", "without this task t = 1024 is at {}"),
        ("window16-512", "t = 512 at {}"),
    ):
        apart = [report.differences(found[name][task], found["dense"][task]) for task in rest]
        assert told.format(report.lost(apart)) in page


def test_attention_is_by_layers_and_tasks(monkeypatch):
    whole = {"kept": [1.0] * 24, "read": [1.0] * 24}
    some = {"kept": [0.5] * 8 + [1.0] * 16, "read": [0.25] * 8 + [0.75] * 16}
    arms = {
        name: {"recall": {"4096": {"vt": [some, some], "cwe": [whole]}}}
        for name in ("dense", *pages.ATTENTION)
    }
    monkeypatch.setattr(published, "result", lambda name: {"arms": arms})
    head, _, first, *_ = pages.attention().splitlines()
    assert head == (
        "| arm | kept: layers 1 to 8 | kept: the others | read: layers 1 to 8 | read: the others |"
    )
    assert first == "| ROCKETKV, t = 256 | 75 | 100 | 62 | 88 |"
    head, _, first, *_ = pages.attention_by_task().splitlines()
    assert head == "| arm | vt (2): kept | vt (2): read | cwe (1): kept | cwe (1): read |"
    assert first == ("| ROCKETKV, t = 256 | 50 / 100 | 25 / 75 | 100 / 100 | 100 / 100 |")


def test_rows_of_the_selector_before_its_repair_are_marked():
    rows = [
        line.split(" | ")[0]
        for name, make in pages.TABLES.items()
        for line in make().splitlines()
        if "`previous`" in line.split(" | ")[0]
    ]
    assert len(rows) == 6
    assert all(row.endswith("†") for row in rows), rows
