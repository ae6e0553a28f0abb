# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Pictures show what result files say, and no picture is older than its data."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from benchmarks import published, results
from benchmarks.pictures import generations, memory, picture, quality, speed
from benchmarks.pictures.__main__ import FOLDER, PICTURES, main

DOCS = FOLDER.parent
MADE = {found.name: found for found in (make() for make in PICTURES)}


def digest_in(text):
    """Of the data that a picture says it was drawn from."""
    return re.search(r"sha256:([0-9a-f]{64})", text)[1]


@pytest.mark.parametrize("name", MADE)
def test_a_picture_is_as_new_as_its_data(name):
    assert digest_in((FOLDER / f"{name}.svg").read_text()) == MADE[name].digest, "run make report"


def test_every_file_is_a_picture_and_stands_in_the_pages():
    files = {path.stem for path in FOLDER.glob("*.svg")}
    assert files == set(MADE)
    assert set(re.findall(r"images/([\w-]+)\.svg", (DOCS / "pictures.md").read_text())) == files
    shown = re.findall(
        r"!\[[^]]+\]\((\S+?)([\w-]+)\.svg\)", (DOCS.parent / "README.md").read_text()
    )
    assert len(shown) == 4
    assert {folder for folder, _ in shown} == {"docs/images/"}
    assert {name for _, name in shown} <= files


@pytest.mark.parametrize("name", MADE)
def test_what_is_shown_stands_in_the_file(name):
    """Title, names and labels are text, which one can search."""
    shown = MADE[name]
    found = xml.parse(FOLDER / f"{name}.svg").getroot()
    words = " ".join(
        " ".join(each.itertext()) for each in found.iter() if each.tag.endswith("text")
    )
    for text in (shown.title, shown.note, shown.x, shown.y, *shown.categories):
        assert text in words
    assert all(series.name in words for series in shown.series if series.role not in ("bar",))


def changed(monkeypatch, file, change):
    """The same results but for one change of a file."""
    right = published.result

    def result(name):
        found = right(name)
        if name == file:
            change(found)
        return found

    for module in (generations, memory, picture, quality, speed):
        monkeypatch.setattr(module, "result", result)


def later(found, arm):
    """The last point of a long generation."""
    return found["cells"][generations.CELL]["arms"][arm]["curve"][-1]


@pytest.mark.parametrize(
    ("file", "change", "names"),
    [
        ("capacity", lambda found: found["arms"]["dense"].update(peak_running=4), {"capacity"}),
        (
            "prompts-qwen-16k",
            lambda found: found["cells"][0]["arms"]["prompts-64"]["cpu"].update(median=1.0),
            {"prompts"},
        ),
        (
            "serving-smollm2-4k",
            lambda found: found["points"][0].update(output_throughput=1.0),
            {"serving"},
        ),
        ("speed-qwen-16k", lambda found: found["cells"][0].update(bound=9.0), {"speed"}),
        (
            "sparda-overlap",
            lambda found: found["rows"][0].update(step_ms={"median": 1}),
            {"overlap"},
        ),
        (
            generations.FILE,
            lambda found: later(found, "stage2-512").update(cpu_ms=1.0),
            {"generations-steps"},
        ),
        (
            generations.FILE,
            lambda found: later(found, "rocketkv-512").update(device_bytes=1 << 20),
            {"generations"},
        ),
        (
            "sparda-overlap",
            lambda found: next(
                row for row in found["rows"] if row["arm"] == "prefetch" and row["rate"] == 0.4
            ).update(exposed_wait_ms_per_step=1.0),
            {"waits"},
        ),
    ],
)
def test_another_result_is_another_picture(monkeypatch, file, change, names):
    changed(monkeypatch, file, change)
    assert {each.name for each in (make() for make in PICTURES) if each != MADE[each.name]} == names


def of(name, series):
    return next(dict(each.points) for each in MADE[name].series if each.name == series)


def read(name):
    return json.loads((results.FOLDER / f"{name}.json").read_text())


def test_points_are_those_of_the_files():
    cell = read("speed-smollm2-8k-alone")["cells"][0]
    assert of("speed", "ROCKETKV")[2] == round(cell["arms"]["rocket-512"]["speedup"], 3)
    assert of("speed", "bound")[2] == round(cell["bound"], 3)
    points = {(p["arm"], p["users"]): p for p in read("serving-smollm2-4k")["points"]}
    point = points["rocketkv-512", 4]
    each, all_users = MADE["serving"].series[1].points[1]
    assert all_users == round(point["output_throughput"], 2)
    assert each == pytest.approx(1e3 / point["tpot_ms"]["p50"], abs=0.01)
    rows = read("sparda-overlap")["rows"]
    waited = [row["exposed_wait_ms_per_step"] for row in rows if row["arm"] == "prefetch"]
    assert sorted(of("waits", "a layer ahead").values()) == pytest.approx(sorted(waited), abs=0.01)
    cell = read("prompts-qwen-16k")["cells"][0]
    assert of("prompts", "stock")[16384] == round(cell["arms"]["dense"]["cpu"]["median"], 2)
    point = later(read(generations.FILE), "sparda-32")
    assert of("generations", "SPARDA")[point["generated"]] == round(
        point["device_bytes"] / 2**20, 3
    )
    assert of("generations-steps", "SPARDA")[point["generated"]] == round(point["cpu_ms"], 2)
    cell = read("sparda-memory-qwen-32k")["cells"][0]["arms"]["sparda-32"]
    total = sum(dict(each.points)[4] for each in MADE["memory"].series)
    slab, step = (cell["measured"][name] for name in ("slab", "working_set"))
    assert slab > step
    assert total == pytest.approx((cell["device_bytes"] + slab - step) / 2**20, abs=0.01)


def test_differences_are_of_the_same_questions():
    """By another way than the picture's: a mean over tasks of means over shared questions."""
    arms = read("quality-lab")["arms"]
    names = ["dense", *(f"{kind}-{n}" for kind in ("window16", "paper") for n in (256, 512, 1024))]
    cells = [arms[name]["4096"] for name in names]
    means = []
    for task in cells[0]:
        keys = [key for key in cells[0][task] if all(key in cell.get(task, {}) for cell in cells)]
        if len(keys) >= quality.FEWEST:
            means.append([np.mean([cell[task][key]["score"] for key in keys]) for cell in cells])
    dense, *others = 100 * np.mean(means, 0)
    default, paper = (dict(each.points) for each in MADE["quality-budget"].series[1:])
    found = [each[n] for each in (default, paper) for n in (256, 512, 1024)]
    assert found == pytest.approx([other - dense for other in others], abs=1e-3)


def test_the_same_data_make_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.pictures.draw import svg

    assert main(["--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.svg")} == set(MADE)
    text = svg(MADE["capacity"])
    assert (tmp_path / "capacity.svg").read_text() == text
    assert digest_in(text) == MADE["capacity"].digest
