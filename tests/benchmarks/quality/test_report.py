# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Means, intervals and paired differences."""

from __future__ import annotations

import pytest

from benchmarks.quality import report


def _answers(*scores: float) -> dict:
    return {str(index): {"score": score, "reply": ""} for index, score in enumerate(scores)}


def test_differences_are_of_the_same_questions() -> None:
    assert report.differences(_answers(0.5, 1.0, 0.0), _answers(1.0, 1.0)) == [-0.5, 0.0]


def test_interval_holds_the_mean_and_narrows() -> None:
    low, high = report.interval([0.0, 1.0] * 10)
    more = report.interval([0.0, 1.0] * 100)
    assert low < more[0] < 0.5 < more[1] < high
    assert report.interval([1.0] * 5) == (1.0, 1.0)


def test_the_order_of_tasks_and_questions_does_not_matter() -> None:
    tasks = [[0.0, 1.0, -0.5, 0.0, 1.0], [0.2, -0.3, 0.1], [0.0, -1.0, 1.0, -1.0]]
    other = [each[::-1] for each in tasks[::-1]]
    assert report.lost_points(tasks) == report.lost_points(other)


def test_where_no_score_differs_the_number_of_questions_is_said() -> None:
    assert report.lost([[0.0] * 16]) == "no difference in 16"
    assert report.lost([[0.0] * 3, [0.0] * 4]) == "no difference in 7"
    assert report.lost([[0.0, 0.0], [1.0, -1.0]]).startswith("+0.0 (-")


def test_table() -> None:
    arms = {
        "dense": {"4096": {"vt": _answers(1.0, 1.0), "cwe": _answers(0.5, 0.5)}},
        "other": {"settings": {}, "4096": {"vt": _answers(0.5, 0.5), "cwe": _answers(0.5, 0.5)}},
    }
    text = report.render({"arms": arms})
    assert "**4096 tokens**" in text
    assert "| other | 0.50 | 0.50 | 0.500 | -25.0 (-25.0 to -25.0) |" in text
    head, other = text.split("To dense by task, points (90 %):\n\n")[1].splitlines()[::2]
    assert head == "| arm | vt (2) | cwe (2) |"
    assert other == "| other | -50 (-50 to -50) | 0 |"
    assert text.count("\n|") == 7


def test_scores_of_arms_that_read_everything_have_a_star() -> None:
    arms = {name: {"4096": {"vt": _answers(1.0), "cwe": _answers(0.5)}} for name in ("dense", "b")}
    for cells in arms.values():
        cells["4096"]["vt"]["0"]["read_everything"] = True
    text = report.render({"arms": arms})
    assert "| dense | 1.00 | 0.50 |" in text
    assert "| b | 1.00* | 0.50 |" in text


def test_arms_with_fewer_questions_say_so() -> None:
    arms = {
        "dense": {"4096": {"vt": _answers(0.0, 1.0)}},
        "a": {"4096": {"vt": _answers(0.5)}},
    }
    text = report.render({"arms": arms})
    assert "| a | 0.50 (1) | 0.500 | +50.0 (+50.0 to +50.0) |" in text
    assert "| dense | 0.50 | 0.500 | |" in text


@pytest.mark.parametrize("scores", [(1.0,), (0.2, 0.4)])
def test_one_arm_alone(scores: tuple[float, ...]) -> None:
    assert "dense" in report.render({"arms": {"dense": {"8192": {"vt": _answers(*scores)}}}})
