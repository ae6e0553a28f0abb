# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""README and docs say what code and results say, and their links lead somewhere."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from benchmarks import published
from scripts.pages import fill, hooks, plans, settings
from vllm_sparse.policies.making import make_policy
from vllm_sparse.policies.protocol import Shape
from vllm_sparse.registry import settings_class

PAGES = fill.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tables_say_what_code_and_results_say(path):
    text = path.read_text()
    assert fill.filled(text) == text, "run make tables"
    assert len(fill.marked(text)) == text.count("<!-- end -->") == text.count("<!-- table: ")


def test_every_table_is_published_once():
    found = [name for path in PAGES for name in fill.marked(path.read_text())]
    assert sorted(found) == sorted(fill.TABLES), (
        f"no page marks {fill.TABLES.keys() - set(found)}: write <!-- table: NAME --> and "
        "<!-- end --> where it belongs, then run make tables"
    )


def test_a_changed_result_changes_a_page(monkeypatch):
    right = published.result

    def wrong(name):
        found = right(name)
        if name == "capacity":
            found["arms"]["dense"]["seconds"] += 100
        return found

    monkeypatch.setattr(published, "result", wrong)
    changed = {path.name for path in PAGES if fill.filled(path.read_text()) != path.read_text()}
    assert changed == {"README.md", "benchmarks.md"}


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError):
        fill.filled("<!-- table: nothing -->\n<!-- end -->")


@pytest.mark.parametrize("backend", settings.BACKENDS)
def test_every_setting_stands_in_its_table_with_its_default(backend):
    page = (fill.ROOT / "docs/settings.md").read_text()
    found = re.findall(rf"<!-- table: settings-{backend} -->(.*?)<!-- end -->", page, re.DOTALL)
    assert len(found) == 1, f"docs/settings.md needs one marked table settings-{backend}"
    (text,) = found
    rows = {
        line.split(" | ")[0].strip("|` "): [cell.strip(" |") for cell in line.split(" | ")[1:]]
        for line in text.splitlines()
        if line.startswith("| `")
    }
    fields = settings_class(backend).model_fields
    assert set(rows) == set(fields) - {"algorithm"}
    for name, (default, allowed, meaning) in rows.items():
        value = fields[name].default
        value = list(value) if isinstance(value, tuple) else value
        assert default == ("\N{EN DASH}" if value is None else str(value).lower()), name
        assert allowed
        assert meaning.endswith("."), name


@pytest.mark.parametrize(
    ("backend", "key", "words"),
    [
        ("rocketkv", "token_budget", "integer ≥ 16"),
        ("rocketkv", "page_sizes", "list of integers > 0"),
        ("rocketkv", "stage1", "`true`, `false`"),
        ("sparda", "sparse_prefill", "`true`, `false` or integer > 0"),
        ("sparda", "slab_gib", "number > 0"),
        ("sparda", "forecast", "text"),
        ("snapkv", "skip_layers", "`0`"),
    ],
)
def test_what_is_allowed_is_said_in_words(backend, key, words):
    assert settings.allowed(settings_class(backend).model_fields[key]) == words


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "assets/README.md"]
)
def test_links_of_pages_that_the_site_lacks_lead_to_files(name):
    """The others' are checked by the strict build."""
    path = fill.ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", path.read_text()):
        assert (path.parent / target).exists(), target


FOLDERS = (
    *("assets", "benchmarks", "configs", "docs", "examples", "grafana", "kernels", "scripts"),
    *("tests", "vllm_sparse"),
)
FILES = {
    f"/{path.relative_to(fill.ROOT)}"
    for path in (*fill.ROOT.glob("*"), *(at for x in FOLDERS for at in (fill.ROOT / x).rglob("*")))
}
NAMED = re.compile(r"(?<![\w/<-])\w[\w./-]*\.(?:py|md|json|ya?ml|sh|cpp|safetensors|svg|js)\b")
ELSEWHERE = {"config.json", "worker/gpu/model_runner.py"}  # of a model, of vLLM


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_files_that_a_page_names_exist(path):
    for code in re.findall(r"`([^`\n]+)`", path.read_text()):
        for name in set(NAMED.findall(code)) - ELSEWHERE:
            blank = re.search(r"\b(NAME|test_NAME)\b", name)
            assert blank or any(file.endswith(f"/{name}") for file in FILES), name


@pytest.mark.parametrize("name", [name for name in settings.BACKENDS if name != "sparda"])
def test_what_blocks_hold_beside_keys_and_values_is_as_the_table_says(name):
    table = (fill.ROOT / "docs/choose.md").read_text().split("## What each costs")[1]
    names, row = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith(("| | ROCKETKV", "| beside the keys and values"))
    )
    assert name.upper() in names, (
        f"docs/choose.md: the table 'What each costs' needs a column {name.upper()}"
    )
    said = re.match(r"([\d.]+) %|nothing", row[names.index(name.upper())])
    policy = make_policy(name.upper(), settings_class(name)(), Shape(128, 4, 64, 8192))
    share = 100 * policy.numbers_per_token / (2 * 128) - 100
    assert float(said[1] or 0) == pytest.approx(share, abs=0.5)


def test_where_sparda_s_step_becomes_shorter_is_as_the_page_says():
    page = (fill.ROOT / "docs/choose.md").read_text()
    (said,) = re.findall(r"shorter than\ndense's from ([\d,]+) tokens on", page)
    (above,) = re.findall(r"does not hold all blocks, here above ([\d,]+) tokens", page)
    sparda, above = plans.planned(16384)["SPARDA"], int(above.replace(",", ""))
    assert said == f"{sparda.wins_from:,}"
    for context, hosted in ((above, False), (above + 1024, True)):
        assert bool(plans.planned(context)["SPARDA"].host_bytes) == hosted


def test_the_readme_is_two_screens():
    """Of 65 lines of 120 columns, as it is rendered: without comments and targets of links."""
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)", "", (fill.ROOT / "README.md").read_text())
    lines = [line or " " for line in text.splitlines()]
    assert sum(-(-len(line) // 120) for line in lines) <= 130


class TestHooks:
    @staticmethod
    def shown(text):
        return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri="a.md")))

    def test_a_link_out_of_the_pages_is_a_name(self, caplog):
        assert self.shown("in [`configs/`](../configs), [B](b.md)") == "in `configs/`, [B](b.md)"
        assert not caplog.records

    def test_one_that_leads_nowhere_ends_a_strict_build(self, caplog):
        self.shown("[x](../nowhere.py)")
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.name.startswith("mkdocs")
        assert "../nowhere.py" in record.getMessage()

    def test_the_changelog_is_included(self):
        text = self.shown((fill.ROOT / "docs/changelog.md").read_text())
        assert "## [Unreleased]" in text
        assert "(docs/" not in text

    def test_the_readme_is_the_first_page(self, caplog):
        text = self.shown((fill.ROOT / "docs/index.md").read_text())
        assert text.startswith("# vllm-sparse")
        assert "[Get started](start.md)" in text
        assert "](images/speed.svg)" in text
        assert not re.search(r"\]\((docs/|\.\./)", text)
        assert not caplog.records
