# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The programs for a GPU host, without a GPU: planning, budgets, byte formulas, tables, parity."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar

import pytest

from benchmarks.gpu import bench, bounds, check, host, models, stages, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
LLAMA, MINICPM = models.LLAMA, models.MINICPM


def options_of(tmp_path, *arguments: str) -> argparse.Namespace:
    return bench.parser_of().parse_args(["--out", str(tmp_path), *arguments])


# Stages whose subprocess is this file.


def succeeds(report, options):
    report.note(seed=options.seed)
    report.add(value=1.5)


def hangs(report, options):
    report.add(value="before")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.note(child=child.pid)
    time.sleep(600)


def crashes(report, options):
    report.add(value="before")
    os.kill(os.getpid(), signal.SIGKILL)


def raises(report, options):
    report.add(value="before")
    raise ValueError("out of\n  luck")


def sleeps(report, options):
    begin = time.time()
    time.sleep(1.5)
    report.add(begin=begin, end=time.time())


def checks(report, options):
    raise stages.CheckFailedError("3 is not 4")


def refuses(report, options):
    raise stages.NotAvailableError("no such thing here")


NAPS = ("sleeps", "sleeps too", "alone", "last")


def plan(options):
    every = [
        stages.Stage("succeeds", succeeds, 60),
        stages.Stage("hangs", hangs, 10, min_s=1),
        stages.Stage("crashes", crashes, 60),
        stages.Stage("raises", raises, 60, needs=("succeeds",)),
        stages.Stage("checks", checks, 60),
        stages.Stage("refuses", refuses, 60),
        stages.Stage("watched", succeeds, 60, prefix=("sh", "-c", '"$@"; exit 9', "sh")),
        stages.Stage("dependent", succeeds, 60, needs=("crashes",)),
    ]
    naps = [stages.Stage(name, sleeps, 60, alone=name == "alone") for name in NAPS]
    return every if options.only is None else [*every, *naps]


def outcome(arguments: Sequence[str], **how: bool) -> int:
    """Runs the stages above and returns the exit status."""
    parser = argparse.ArgumentParser()
    stages.add_options(parser, "tried")
    return stages.main(
        "tests.test_gpu_programs", "tried", parser, plan,
        lambda results: ("a table", {"extra": len(results)}), arguments, **how,
    )  # fmt: skip


def run(tmp_path, *arguments: str) -> dict:
    """Runs the stages above and returns the result file."""
    outcome(("--out", str(tmp_path), *arguments))
    return json.loads((tmp_path / "tried.json").read_text())


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_every_ending_of_a_stage_is_told_apart_and_keeps_its_rows(tmp_path, capsys):
    result = run(tmp_path, "--seed", "7")
    found = result["stages"]
    assert {name: stage["status"] for name, stage in found.items()} == {
        "succeeds": "ok",
        "hangs": "timed out",
        "crashes": "crashed",
        "raises": "failed",
        "checks": "failed",
        "refuses": "not available",
        "watched": "failed",
        "dependent": "skipped",
    }
    assert found["succeeds"]["rows"] == [{"value": 1.5}]
    assert found["succeeds"]["facts"] == {"seed": 7}
    for name in ("hangs", "crashes", "raises"):
        assert found[name]["rows"] == [{"value": "before"}]
        assert found[name]["log_tail"]
    assert found["raises"]["reason"] == "out of luck"
    assert found["checks"]["reason"] == "3 is not 4"
    assert found["refuses"]["reason"] == "no such thing here"
    assert found["dependent"]["reason"] == "needs crashes"
    assert result["environment"]["seed"] == 7
    assert "torch" in result["environment"]["versions"]
    assert "gpu" in result["environment"]
    assert result["extra"] == 8
    assert has_ended(found["hangs"]["facts"]["child"])
    printed = capsys.readouterr().out
    assert printed.index("stage ") < printed.index("a table") < printed.index("full result")
    assert "not run: dependent; for these use --only crashes dependent" in printed


def test_a_used_up_budget_skips_the_rest_and_says_so(tmp_path, capsys):
    result = run(tmp_path, "--budget-s", "2", "--only", "refuses", "hangs")
    assert list(result["stages"]) == ["hangs", "refuses"]  # by value, as in the plan
    assert result["stages"]["hangs"]["status"] == "timed out"
    assert result["stages"]["refuses"]["status"] == "skipped"
    assert "budget of 2 s" in result["stages"]["refuses"]["reason"]
    assert "not run: refuses" in capsys.readouterr().out


def test_a_killed_run_keeps_what_it_has(tmp_path):
    """And leaves no process behind."""
    command = [sys.executable, "-m", "tests.test_gpu_programs", "--out", str(tmp_path)]
    command += ["--only", "succeeds", "hangs"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "hangs (at most" in line:
                break
        deadline = time.monotonic() + 20
        file = tmp_path / "tried.json"
        while time.monotonic() < deadline:
            found = json.loads(file.read_text())["stages"].get("hangs", {"facts": {}})
            if "child" in found["facts"]:
                break
            time.sleep(0.05)
        assert found["status"] == "running"  # even a run that is killed at once keeps these
        assert found["rows"] == [{"value": "before"}]
        process.terminate()
        process.wait(timeout=20)
    result = json.loads((tmp_path / "tried.json").read_text())
    assert result["stages"]["succeeds"]["status"] == "ok"
    assert result["stages"]["hangs"]["status"] == "interrupted"
    assert result["stages"]["hangs"]["rows"] == [{"value": "before"}]
    assert has_ended(found["facts"]["child"])
    assert "'child': " in (tmp_path / "tried.log").read_text()


def test_what_has_been_measured_is_merged_and_not_measured_again(tmp_path, capsys):
    first = run(tmp_path, "--only", "succeeds", "raises")
    earlier = tmp_path / "earlier.json"
    (tmp_path / "tried.json").rename(earlier)
    result = run(tmp_path, "--merge", str(earlier), "--only", "raises", "refuses")
    assert list(result["stages"]) == ["succeeds", "raises", "refuses"]
    merged = result["stages"]["succeeds"]
    assert merged == {**first["stages"]["succeeds"], "of": first["environment"]["date"]}
    assert "succeeds (at most" not in capsys.readouterr().err.split("raises: failed")[-1]
    with pytest.raises(SystemExit):
        run(tmp_path, "--merge", str(earlier), "--seed", "1", "--only", "refuses")
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_stages_that_measure_no_time_run_at_once(tmp_path):
    started = time.monotonic()
    result = run(tmp_path, "--only", *NAPS, "--jobs", "4")
    assert time.monotonic() - started < 20
    spans = {name: stage["rows"][0] for name, stage in result["stages"].items()}
    first, second, alone, last = (spans[name] for name in NAPS)
    assert first["begin"] < second["end"]
    assert second["begin"] < first["end"]
    assert alone["begin"] > max(first["end"], second["end"])
    assert last["begin"] > alone["end"]


def test_a_run_that_is_to_be_complete_says_if_it_is_not(tmp_path):
    arguments = ["--only", "succeeds", "refuses", "--budget-s", "60", "--out", str(tmp_path)]
    assert outcome(arguments, complete=True) == 0
    arguments[arguments.index("60")] = "10"
    assert outcome(arguments, complete=False) == 0
    assert outcome(arguments, complete=True) == stages.INCOMPLETE
    arguments[2] = "raises"
    arguments[arguments.index("10")] = "60"
    assert outcome(arguments, complete=True) == 1


def test_results_name_no_folder_of_the_machine(tmp_path):
    result = run(tmp_path, "--only", "raises")
    text = json.dumps(result)
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert 'File \\"WORK/path/' in text  # of the traceback


def test_the_commit_may_be_given(monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_COMMIT", "abc")
    assert host.facts()["commit"] == "abc"


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "nothing")


@pytest.mark.parametrize("program", [check, bench])
def test_plans_are_consistent(program, capsys, tmp_path):
    every = program.plan(program.parser_of().parse_args([]))
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names)
    assert names[0] == "smoke"
    for index, stage in enumerate(every):
        assert set(stage.needs) <= set(names[:index]), stage.name
        assert set(stage.beside) <= set(names[:index]), stage.name
        assert 0 < stage.limit_s <= 200
    assert program.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert not any(tmp_path.iterdir())


def test_the_planning_process_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from benchmarks.gpu import bench, check; "
        "print([m for m in ('torch', 'vllm', 'vllm_sparse', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_make_targets_run_the_programs():
    text = (ROOT / "Makefile").read_text()
    for name in ("check", "bench"):
        assert re.search(rf"^gpu-{name}:.*##", text, re.M)
        assert f"-m benchmarks.gpu.{name}" in text


def test_tables_are_aligned():
    lines = stages.table(("name", "n"), [("a", 1), ("long", 12345.6), ("c", None)]).splitlines()
    assert lines[0] == "name      n"
    assert [line.split() for line in lines[2:]] == [["a", "1"], ["long", "12346"], ["c", "-"]]
    assert stages.table(("x",), []).splitlines()[0] == "x"


# Paths of the subprocesses, installed copies.


def test_stages_see_the_checkout_only_through_links(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(site)]))
    assert host.default_site() == site
    assert str(site) in host.install_command(site)
    entries = host.child_paths(tmp_path).split(os.pathsep)
    assert entries[1:] == [str(site)]
    names = sorted(path.name for path in Path(entries[0]).iterdir())
    assert names == ["benchmarks", "tests"]
    monkeypatch.delenv("PYTHONPATH")
    assert host.default_site() == host.SITE


def test_stale_installed_files_are_found(tmp_path):
    import shutil

    for folder, target in host.INSTALLED_AS.items():
        shutil.copytree(ROOT / folder, tmp_path / target, dirs_exist_ok=True)
    package = tmp_path / "vllm_sparse"
    assert host.stale_files(package) == []
    (package / "kernels" / "layout.py").write_text("old")
    (package / "plugin.py").unlink()
    assert host.stale_files(package) == ["vllm_sparse/plugin.py", "kernels/layout.py"]
    assert host.stale_files(ROOT / "vllm_sparse") == []  # an editable install


# Models and bytes.


def test_model_folders_have_the_published_sizes(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = models.write_config(tmp_path / "m", MINICPM, 4096)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 128, 73448)
    assert config.max_position_embeddings == 4096
    assert LLAMA.kv_bytes_per_token == 131072
    assert MINICPM.kv_bytes_per_token == 32768
    assert LLAMA.step_weight_bytes == pytest.approx(15.01e9, rel=1e-3)


def test_prompts_are_reproducible_and_share_what_they_should():
    prompts = models.parity_prompts(3)
    assert prompts == models.parity_prompts(3) != models.parity_prompts(4)
    assert len({len(prompt) for prompt in prompts}) == 6
    assert prompts[0][:1200] == prompts[1][:1200] != prompts[2][:1200]


@pytest.mark.parametrize(
    ("context", "budget", "expected"),
    [(16384, 256, 1.14), (32768, 256, 1.28), (32768, 1024, 1.27), (131072, 256, 2.14)],
)
def test_bounds_at_batch_one_follow_from_bytes(context, budget, expected):
    """A plan of the paper's arithmetic, in which the budget is what a step reads."""
    page, held = 4, 4 * budget
    split = bounds.Split(held, page, LLAMA.head_dim * budget * page // held, budget // 2)
    assert bounds.speedup(LLAMA, 1, context, split) == pytest.approx(expected, abs=0.02)


def test_bytes_of_each_kernel():
    split = bounds.Split(held=4096, page_size=4, top_r=64, top_k=512)
    queries = 2 * 32 * 128
    assert bounds.score_bytes(LLAMA, 3, split) == 3 * (8 * 64 * 1024 * 2 + queries)
    assert bounds.attend_bytes(LLAMA, 3, 512) == 3 * (8 * 512 * 2 * 128 * 2 + 2 * queries)
    assert bounds.select_bytes(LLAMA, 1, split) == 4 * (32 * 1024 + 8 * 512)
    dense = bounds.layer_bytes(LLAMA, 1, 4096, None)
    assert dense * 32 == pytest.approx(4096 * LLAMA.kv_bytes_per_token, rel=1e-2)
    stage1_only = bounds.layer_bytes(LLAMA, 1, 32768, split._replace(stage2=False))
    assert stage1_only == dense
    assert bounds.compact_bytes(LLAMA, 64, 4) == 2 * 8 * 128 * (4 * 64 + 2 * 16)
    assert bounds.prompt_score_bytes(LLAMA, 1000, 32) > 2 * 8 * 128 * 1000
    assert bounds.append_bytes(LLAMA, 1, 4) == 2 * 8 * 128 * (4 + 4 + 2)


def test_bytes_of_each_sparda_kernel():
    keys = 2 * 3 * 2 * 128 * (32768 // 16 + 1)
    assert bounds.select_blocks_bytes(MINICPM, 3, 32768, 16, 96) == keys + 8 * 3 * 2 * 96
    assert bounds.resolve_bytes(wanted=192, misses=20) == 4 * (3 * 192 + 40)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_step_of_a_cycle_misses_the_same_share(rows):
    import torch

    from benchmarks.gpu import kernels_sparda

    generator = torch.Generator().manual_seed(0)
    steps = kernels_sparda.cycle(rows, 2, 30, rows * 2 * 100, generator)
    held = [set(step.flatten().tolist()) for step in steps]
    assert all(len(pieces) == rows * 60 for pieces in held)
    assert all(step.shape == (rows, 2, 30) for step in steps)
    for before, after in zip([held[-1], *held], held, strict=False):
        assert len(after - before) == rows * 6


def test_splits_follow_the_rule_of_the_engine():
    split = bounds.split_of(LLAMA, 32768, {"token_budget": 1024})
    assert 5000 < split.held < 7000
    assert split.stage2
    all_kept = bounds.split_of(LLAMA, 32768, {"token_budget": 1024, "stage1": False})
    assert all_kept.held == 32768
    assert not bounds.split_of(LLAMA, 32768, {"token_budget": 1024, "stage2": False}).stage2


@pytest.mark.parametrize(
    ("context", "budget", "batch", "expected"),
    [(32768, 1024, 27, 7.0), (32768, 256, 27, 8.2), (131072, 256, 1, 2.14), (32768, 1024, 1, 1.27)],
)
def test_bounds_of_the_real_split(context, budget, batch, expected):
    split = bounds.split_of(LLAMA, context, {"token_budget": budget}, block_size=64)
    assert bounds.speedup(LLAMA, batch, context, split) == pytest.approx(expected, abs=0.05)


def test_batches_that_fit():
    assert bounds.most_rows(1000, 100) == 10
    assert bounds.most_rows(1000, 100, once=150) == 8
    assert bounds.most_rows(10, 100, once=50) == 0
    step = bounds.PagedStep(3.0, 4.0)
    assert (step.blocking_ms, step.prefetched_ms) == (7.0, 4.0)


def test_offload_arms_have_the_same_device_memory():
    from benchmarks.gpu import offload

    default = bench.parser_of().parse_args([])
    sizes = {"context": default.sparda_context, "top_k": 96, "generated": 400}
    sizes["device_kv_gib"] = default.device_kv_gib
    found = {arm: offload.plan(MINICPM, arm, most_host_gib=64, **sizes) for arm in offload.ARMS}
    batches = {arm: sized.batch for arm, sized in found.items()}
    assert batches == {"resident": 4, "offload": 19, "first": 17}
    assert found["offload"].slab_gib == pytest.approx(19 * 0.1875, rel=1e-4)
    # Whole requests leave some of it unused, no arm much more than another.
    for sized in found.values():
        assert 0.94 * default.device_kv_gib < sized.device_gib <= default.device_kv_gib
    little = offload.plan(MINICPM, "offload", most_host_gib=5, **sizes)
    assert little.batch == 5
    with pytest.raises(stages.NotAvailableError, match="hold no request"):
        offload.plan(MINICPM, "resident", most_host_gib=64, **{**sizes, "device_kv_gib": 0.5})


def test_target_cells_come_first_and_overheads_have_several_prefills():
    from benchmarks.gpu import decode

    stages_of = {stage.name for part in ("rocketkv", "more") for stage in part_of(part)}
    assert set(decode.CELLS) <= stages_of
    for name in ("dense", "rocket-1024"):
        first = decode.CELLS[name][:3]
        assert [(cell.context // 1024, cell.batches) for cell in first] == [
            (32, (1,)),
            (128, (1,)),
            (16, (1,)),
        ]
        assert first[0].prefills >= 3
        assert first[1].prefills >= 2


def part_of(part: str) -> list[stages.Stage]:
    return bench.plan(bench.parser_of().parse_args(["--part", part]))


def test_without_a_part_the_most_wanted_stages_come_first():
    names = [stage.name for stage in bench.plan(bench.parser_of().parse_args([]))]
    wanted = ["smoke", "dense", "rocket-1024", "sparda-offload", "sparda-resident"]
    assert names[:5] == wanted
    every = {stage.name for part in ("rocketkv", "sparda", "more") for stage in part_of(part)}
    assert every == set(names)


def test_dummy_weights_get_a_spread():
    import torch

    parts = {"norm": torch.nn.LayerNorm(8), "embed_tokens": torch.nn.Embedding(64, 256)}
    model = torch.nn.ModuleDict({**parts, "proj": torch.nn.Linear(256, 256, bias=False)})
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model))
    found = []
    for seed in (3, 3, 4):
        models.randomise(worker, seed)
        found.append(model["proj"].weight.detach().clone())
    assert (model["norm"].weight == 1).all()
    assert float(model["embed_tokens"].weight.detach().std()) == pytest.approx(1.0, rel=0.1)
    assert float(found[0].std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_selection_that_is_one_run_of_memory_is_noticed():
    import torch

    from benchmarks.gpu import locality

    slots = torch.tensor([[5, 6, 7, 1, 2, 9], [3, 4, 5, 6, 7, 8]])
    assert locality.runs_of(slots).tolist() == [3, 1]
    assert locality.Locality(60, 128).scattered
    assert not locality.Locality(1, 128).scattered


def offload_subject(tmp_path, report=None):
    from benchmarks.gpu import offload

    options = options_of(tmp_path)
    options.work = tmp_path
    report = report or stages.Report(tmp_path / "offload.json")
    return offload._Subject("offload", MINICPM, 4e12, 50e9, report, options)


def test_only_what_the_plugin_refuses_is_not_available(tmp_path, monkeypatch):
    from benchmarks.gpu import engines
    from vllm_sparse.errors import ConfigError

    for error, expected in (
        (ConfigError("too little\nmemory"), stages.NotAvailableError),
        (RuntimeError("CUDA error"), RuntimeError),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(engines, "build", fails)
        with pytest.raises(expected):
            offload_subject(tmp_path).start()


@pytest.mark.parametrize(
    ("seconds", "share"), [(0.5, 1.0), (5.0, 0.57), (9.0, 0.316), (60.0, None)]
)
def test_with_little_time_prompts_are_shorter(tmp_path, monkeypatch, seconds, share):
    import torch

    from benchmarks import speed
    from benchmarks.gpu import offload, steering
    from vllm_sparse.config import load_settings

    calls, begun = [], []
    llm = SimpleNamespace(collective_rpc=lambda run, args: calls.append((run, *args)))
    monkeypatch.setattr(offload, "_available_gib", lambda: 100.0)
    monkeypatch.setattr(speed, "prefill", lambda *_: seconds)
    monkeypatch.setattr(speed, "begin", lambda _, prompts, generated: begun.append(prompts))
    report = stages.Report(tmp_path / "offload.json", deadline=time.time() + 100)
    subject = offload_subject(tmp_path, report)
    subject.llm = llm
    if share is None:
        with pytest.raises(stages.NotAvailableError, match="no time"):
            subject.begin()
        return
    subject.begin()
    sized = report.facts["plan"]
    length = report.facts["prompt_tokens"]
    assert length == pytest.approx(share * (sized["context"] - sized["generated"]), rel=0.03)
    assert [len(prompt) for prompt in begun[0]] == [length] * sized["batch"]
    assert calls[0] == (steering.force, length)
    assert len({way for run, way in calls[1:]}) == 4
    # From so many blocks, every rate can be forced.
    runtime = SimpleNamespace(
        settings=load_settings({"vllm_sparse": report.facts["settings"]}, "sparda"),
        step=torch.zeros(1, dtype=torch.int64),
        kernels=SimpleNamespace(select_blocks=None),
    )
    choice = steering.ForcedChoice(runtime, length)
    found = [choice.set_rate(rate) for rate in subject.rates]
    assert found == pytest.approx(subject.rates, abs=0.01)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_forced_choices_miss_exactly_what_they_are_to(rate):
    """With frames for one working set, which the page table then has to replace in every step."""
    import torch
    from vllm_sparse.kernels.reference import sparda_paging, sparda_select
    from vllm_sparse.kernels.types import Blocks, Ranking

    from benchmarks.gpu import batches_sparda, steering
    from vllm_sparse.config import SpardaSettings

    settings = SpardaSettings(local_blocks=2, top_k=14, dense_len=0)
    rows, heads, width, start = 2, 2, 24, 64 * 20 + 50
    layers = [torch.randn(rows * width + 1, heads, 4, 8) for _ in range(2)]
    runtime = SimpleNamespace(
        settings=settings,
        step=torch.zeros(1, dtype=torch.int64),
        kernels=SimpleNamespace(select_blocks=sparda_select.select_blocks),
        compressed=layers.__getitem__,
    )
    choice = steering.ForcedChoice(runtime, start)
    assert choice.set_rate(rate) == round(10 * rate) / 10
    with pytest.raises(ValueError, match="too few"):
        choice.set_rate(0.9)
    table = (1 + torch.randperm(rows * width)).view(rows, width).int()
    table = torch.cat((table, torch.zeros(1, width, dtype=torch.int32)))
    blocks = Blocks(64, 16, 1, 2, 14)
    frames = batches_sparda.empty_table((rows * width + 1) * heads, rows * heads * 14, table.device)
    for number in range(30):  # the first row crosses a block border
        runtime.step += 1
        positions = torch.tensor([start + number, start + number + 30, -1])
        vectors = torch.randn(3, heads, 8)
        before = int(choice.new)
        chosen = []
        for layer in layers:
            arguments = (layer, vectors, table, positions, Ranking(False), blocks)
            chosen.append(choice(*arguments, dense_len=0, capacity=16))
        assert torch.equal(chosen[0].pieces, chosen[1].pieces)
        selected = chosen[0]
        assert selected.pieces.dtype == torch.int32
        assert (selected.pieces[2] == -1).all()
        assert (selected.pieces[:, :, 14:] == -1).all()
        logical = selected.blocks[:2, :, :14]
        assert all(len(set(row.tolist())) == 14 for row in logical.flatten(0, 1))
        own = positions[:2, None] // 64
        assert (logical[:, :, 0] == 0).all()
        assert (logical[:, :, -3:] == own[:, :, None] + torch.tensor([-2, -1, 0])).all()
        physical = table[:2].gather(1, logical.flatten(1).long()).view_as(logical)
        assert torch.equal(selected.pieces[:2, :, :14], physical * 2 + torch.tensor([[0], [1]]))
        counters = torch.zeros(3, dtype=torch.int64)
        found = sparda_paging.resolve(frames, selected.pieces, torch.tensor([number + 1]), counters)
        if number:
            assert int(found.misses) == heads * (int(choice.new) - before)
    assert int(choice.new) == rows * 30 * round(10 * rate) + 1


def test_graphs_are_found_in_both_model_runners():
    from benchmarks.gpu import steering

    old = SimpleNamespace(model=object())
    new = SimpleNamespace(model=object(), cudagraph_manager=object())
    assert steering.graphs_of(old) == (old.model, "concrete_cudagraph_entries")
    assert steering.graphs_of(new) == (new.cudagraph_manager, "graphs")
    # Where this vLLM keeps them, and looks for them at replay.
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    assert "self.concrete_cudagraph_entries[" in inspect.getsource(CUDAGraphWrapper.__call__)
    assert "self.graphs[desc].replay()" in inspect.getsource(CudaGraphManager.run_fullgraph)
    assert "self.graphs[desc] = graph" in inspect.getsource(CudaGraphManager.capture)


@pytest.mark.parametrize("graphs", [True, False])
def test_each_way_to_fetch_has_graphs_of_its_own(graphs):
    """Captured once, of kernels that copy or not, and found again."""
    import torch
    from vllm_sparse.kernels.dispatch import SpardaKernels

    from benchmarks.gpu import steering
    from benchmarks.gpu.steering import Way
    from vllm_sparse.config import SpardaSettings

    captured, copied = [], []

    class Manager:
        graphs: ClassVar[dict] = {}

    def capture_model():
        runtime.fetcher.kernels.copy_pieces(None, None, None, None, "count")
        captured.append(runtime.fetcher.prefetch)
        manager.graphs[len(captured)] = "graph"

    manager = Manager()
    fields = dict.fromkeys(SpardaKernels._fields)
    fields["copy_pieces"] = lambda *arguments: copied.append(arguments[-1])
    runtime = SimpleNamespace(
        settings=SpardaSettings(local_blocks=2, top_k=8),
        step=torch.zeros(1, dtype=torch.int64),
        kernels=SpardaKernels(**fields),
        fetcher=SimpleNamespace(kernels=None, prefetch=None),
    )
    builder = SimpleNamespace(runtime=runtime)
    group = SimpleNamespace(get_metadata_builder=lambda: builder)
    mode = SimpleNamespace(has_full_cudagraphs=lambda: graphs)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode)),
        model_runner=SimpleNamespace(
            attn_groups=[[group]], cudagraph_manager=manager, capture_model=capture_model
        ),
    )
    steering.force(worker, 2048)
    assert runtime.kernels.select_blocks is worker.steering.choice
    ways = [Way(True), Way(False), Way(True, copies=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.set_current_vllm_config", contextlib.nullcontext)
        for way in [*ways, *ways]:
            steering.fetch(worker, way)
            assert runtime.fetcher.prefetch == way.prefetch
            assert list(manager.graphs) == ([1 + ways.index(way)] if graphs else [])
    assert captured == ([True, False, True] if graphs else [])
    assert [int(count) for count in copied[2:]] == ([0] if graphs else [])
    assert copied[:2] == (["count", "count"] if graphs else [])


# Verdicts.


def test_the_first_difference_of_each_request_is_found_with_its_gap():
    likely = [{1: -0.5, 2: -3.5}, {5: -1.0, 6: -1.01, 4: -1.02}, {7: -0.1, 8: -2.1}]
    baseline = [[tokens.step_of(max(row, key=row.get), row) for row in likely]] * 5
    outputs = [[1, 5, 7], [1, 6, 9], [1, 4, 7], [2, 5, 7], [1, 5, 3]]
    found = tokens.divergences(outputs, baseline)
    assert [(d.request, d.position) for d in found] == [(1, 1), (2, 1), (3, 0), (4, 2)]
    # What follows a near-tie is another text, and is not judged.
    assert [d.gap for d in found] == pytest.approx([0.01, 0.02, 3.0, tokens.UNLIKELY])


def test_variants_cover_what_is_asked_for():
    every = tokens.variants()
    assert {"whole-graphs", "whole-eager", "chunked", "prefix-cache", "preemption"} <= set(every)
    assert {"sparda-whole", "sparda-offload", "sparda-blocking", "sparda-graphs"} <= set(every)
    for name, variant in every.items():
        assert variant.baseline or variant.differs_from or name == tokens.STOCK
        if variant.settings:
            assert variant.expect  # or it could pass without having done anything


@pytest.mark.parametrize("tiny", [False, True])
def test_the_slabs_of_sparda_are_as_small_as_start_up_allows(tiny):
    from vllm_sparse.config import load_settings
    from vllm_sparse.errors import ConfigError
    from vllm_sparse.kv.host.geometry import GIB, block_bytes, host_blocks, plan_frames

    longest = max(map(len, models.parity_prompts(0, tiny=tiny))) + (24 if tiny else 80)
    max_model_len = 1024 if tiny else 4096
    seen = []
    for name, variant in tokens.variants(tiny=tiny).items():
        if variant.backend != "SPARDA":
            continue
        settings = load_settings({"vllm_sparse": variant.settings}, "sparda")
        shape = {"num_layers": 3, "num_kv_heads": 2}
        block = block_bytes(**shape, block_size=settings.block_size, head_dim=64, itemsize=2)
        blocks = host_blocks(settings, block, max_model_len)
        each = -(-longest // settings.block_size)
        assert blocks > tokens.REQUESTS * each  # none is preempted
        sizes = {
            **shape,
            "num_pieces": blocks * 2,
            "piece_bytes": block // 6,
            "max_num_seqs": variant.arguments["max_num_seqs"],
            "max_model_len": max_model_len,
        }
        frames = plan_frames(settings, **sizes)
        seen.append(name)
        if settings.resident:
            continue
        assert frames == (tokens.REQUESTS * 2 * settings.blocks_read,) * 3
        assert frames[0] < sizes["num_pieces"]
        assert settings.blocks_read >= each if name == "sparda-whole" else settings.top_k < each
        little = variant.settings | {"slab_gib": variant.settings["slab_gib"] - 1 / GIB}
        with pytest.raises(ConfigError, match="slab_gib"):
            plan_frames(load_settings({"vllm_sparse": little}, "sparda"), **sizes)
    assert len(seen) == 7


def test_graphs_are_compared_with_eager_steps():
    from benchmarks.gpu import engines

    every = tokens.variants()
    for name in (tokens.SPARDA, tokens.SPARDA_AHEAD):
        assert every[name].mode == engines.EAGER
        compared = [variant for variant in every.values() if variant.baseline == name]
        assert all(variant.mode == engines.GRAPHS for variant in compared)
        paged = [variant.settings for variant in compared if "slab_gib" in variant.settings]
        assert paged


def test_steps_without_the_graphs_that_were_asked_for_are_an_error():
    from benchmarks.gpu import engines

    for mode, found, fine in (
        (engines.GRAPHS, "FULL_DECODE_ONLY", True),
        (engines.GRAPHS, "NONE", False),
        (engines.GRAPHS, "PIECEWISE", False),
        (engines.EAGER, "NONE", True),
        (engines.COMPILED, "FULL_AND_PIECEWISE", True),
        (engines.COMPILED, "PIECEWISE", False),
    ):
        facts = {"graphs": f"CUDAGraphMode.{found}"}
        with contextlib.nullcontext() if fine else pytest.raises(stages.CheckFailedError):
            engines.check_graphs(facts, mode)


def test_what_must_be_checked_comes_first_and_one_engine_is_alone():
    every = {stage.name: stage for stage in check.plan(check.parser_of().parse_args([]))}
    names = list(every)
    wanted = {"kernels", "whole-eager", "chunked", "prefix-cache", "preemption", "sanitizer"}
    assert wanted <= set(names[: names.index("sparda-whole")])
    assert [name for name, stage in every.items() if stage.alone] == ["sparda-profiled"]


def measured(step_ms: float, bound_ms: float, **row) -> dict:
    summary = {"median": step_ms}
    rate = 1e3 * row["batch"] / step_ms
    least = {"bound_ms": bound_ms, "least_bytes": bound_ms * 4.3e9}
    common = {"tokens_per_s": rate, "preemptions": 0, **least}
    return {"step_ms": summary, "wanted": row["batch"], **common, **row}


def forced(arm: str, step_ms: float, bound_ms: float, batch: int) -> dict:
    row = {"arm": arm, "rate": 0.1, "new_share": 0.097, "context": 32000, "fetched_mib": 228.0}
    row = measured(step_ms, bound_ms, batch=batch, as_forced=True, **row)
    del row["wanted"], row["preemptions"]
    return row if arm == "resident" else {**row, "exposed_wait_ms": 3.5}


def results_of_a_bench() -> dict[str, dict]:
    thousand = 1024
    dense = [
        measured(4.0, 3.6, context=16 * thousand, batch=1),
        measured(5.0, 4.5, context=32 * thousand, batch=1),
        measured(30.0, 27.0, context=32 * thousand, batch=27, wanted="most"),
        {"context": 32 * thousand, "prefill_s": 1.0},
        {"context": 32 * thousand, "prefill_s": 1.04},
        {"context": 128 * thousand, "prefill_s": 14.0},
        {"context": 8 * thousand, "wanted": "most", "batch": 99, "skipped": "no time"},
    ]
    ours = [
        measured(4.0, 3.1, context=16 * thousand, batch=1),
        measured(4.0, 3.5, context=32 * thousand, batch=1),
        measured(6.0, 4.0, context=32 * thousand, batch=27),
        measured(9.0, 8.0, context=32 * thousand, batch=108, wanted="most"),
        *({"context": 32 * thousand, "prefill_s": seconds} for seconds in (1.03, 1.04, 9.0)),
        {"context": 128 * thousand, "prefill_s": 14.0},
    ]
    blocking = {**forced("blocking", 10.0, 9.0, 19), "in_flight_gb_per_s": 48.0}
    paged = [blocking, forced("prefetch", 6.0, 5.0, 19), {"rate": 0.2, "skipped": "no time"}]
    resident = [forced("resident", 4.2, 4.0, 4)]
    kernel = {"kernel": "append", "context": 8192, "budget": 256, "batch": 1, "block_size": 64}
    kernel |= {"us": 4.0, "gb_per_s": 12.0, "share_of_copy": 0.003}
    failed = {"kernel": "select slots", "error": "no kernel image"}
    fetched = {"kernel": "copy pieces", "programs": 32, "context": 32768, "batch": 16}
    fetched |= {"misses": 307, "us": 200.0, "gb_per_s": 50.0, "share_of_link": 0.9}
    status = {"status": "ok", "reason": "", "seconds": 1.0}
    link = {"link_gb_per_s": {"host_to_device": 55.0}, "device_kv_gib": 4.2}
    link |= {"plan": {"device_gib": 4.17}, "graphs": "CUDAGraphMode.FULL_DECODE_ONLY"}
    return {
        "kernels-sparda": {**status, "rows": [fetched, failed], "facts": {"link_gb_per_s": 55.0}},
        "kernels": {**status, "rows": [kernel, failed], "facts": {"copy_gb_per_s": 4300.0}},
        "sparda-offload": {**status, "rows": paged, "facts": link},
        "sparda-resident": {**status, "rows": resident, "facts": link},
        "dense": {**status, "rows": dense, "facts": {}},
        "rocket-1024": {**status, "rows": ours, "facts": {"graphs": "X.FULL_DECODE_ONLY"}},
    }


def verdicts(results: dict[str, dict]) -> dict[str, str]:
    return {target.what: target.verdict for target in bench.targets(results)}


def test_targets_are_judged_next_to_their_bounds():
    results = results_of_a_bench()
    found = {target.what: target for target in bench.targets(results)}
    unknown = "not measured"
    assert {what: target.verdict for what, target in found.items()} == {
        "16K, batch 1, t = 1024: x dense": "yes",
        "32K, batch 1, t = 1024: x dense": "yes",
        "128K, batch 1, t = 1024: x dense": unknown,
        "32K, stock's largest batch, t = 1024: x dense": "yes",
        "16K, batch 1, t = 256: x dense": unknown,
        "32K, batch 1, t = 256: x dense": unknown,
        "128K, batch 1, t = 256: x dense": unknown,
        "32K, stock's largest batch, t = 256: x dense": unknown,
        "32K, t = 1024: largest batch over stock's": "yes",
        "prefill overhead at 32K, t = 1024, %": "yes",
        "prefill overhead at 128K, t = 1024, %": unknown,  # once is not enough
        "SPARDA, 10% misses: tokens/s, prefetch over blocking": "yes",
        "SPARDA, 10% misses: tokens/s, over all resident": "no",
    }
    batched = found["32K, stock's largest batch, t = 1024: x dense"]
    assert batched.found == pytest.approx(5.0)
    assert batched.bound == pytest.approx(27 / 4)
    assert found["32K, t = 1024: largest batch over stock's"].found == 4.0
    overhead = found["prefill overhead at 32K, t = 1024, %"]
    assert overhead.found == pytest.approx(100 * (1.04 / 1.02 - 1))  # medians
    ahead = found["SPARDA, 10% misses: tokens/s, prefetch over blocking"]
    assert (ahead.found, ahead.bound) == (pytest.approx(10 / 6), pytest.approx(9 / 5))
    resident = found["SPARDA, 10% misses: tokens/s, over all resident"]
    assert resident.found == pytest.approx(19 / 4 * 4.2 / 6)
    assert resident.bound == pytest.approx(19 / 4 * 4 / 5)
    results["rocket-1024"]["rows"][1]["step_ms"]["median"] = 5.0
    assert verdicts(results)["32K, batch 1, t = 1024: x dense"] == "no"


def test_what_did_not_run_as_it_was_to_reaches_no_target():
    results = results_of_a_bench()
    results["sparda-offload"]["rows"][0]["as_forced"] = False
    results["rocket-1024"]["rows"][3]["preemptions"] = 2
    results["dense"]["rows"][0]["preemptions"] = 1
    found = verdicts(results)
    for what in (
        "SPARDA, 10% misses: tokens/s, prefetch over blocking",
        "32K, t = 1024: largest batch over stock's",
        "16K, batch 1, t = 1024: x dense",
    ):
        assert found[what] == "not measured"


def test_tables_show_what_was_measured():
    text, further = bench.summary(results_of_a_bench())
    assert "not measured" in text
    assert re.search(r"append +8192 +256 +1 +64 +4 +12 +0\.003", text)
    assert re.search(r"copy pieces +32 +32768 +16 +307 +200 +50 +- +0\.9", text)
    assert re.search(r"sparda-offload: 4\.17 of 4\.2 GiB .* link 55", text)
    assert re.search(r"blocking +32000 +19 +9\.7 +10 +- +9 +3\.5 +1900 +228 +48 +True", text)
    assert re.search(r"prefetch +32000 +19 +9\.7 +6 +- +5 +3\.5 +3167 +228 +- +True", text)
    assert re.search(r"rocket-1024 +32768 +27 +6 +- +4 +4500 +0 +5 +6\.75", text)
    assert re.search(r"rocket-1024 +FULL_DECODE_ONLY", text)
    assert [verdict["reached"] for verdict in further["targets"]][1] == "yes"
    assert bench.summary({})[1]["targets"][0]["reached"] == "not measured"


def test_the_check_prints_its_worst_errors():
    def row(kernel, error, case):
        return {"kernel": kernel, "error": error, "limit": 0.01, "ok": error <= 0.01, "case": case}

    rows = [row("append", 0.0, "a"), row("append", 0.5, "b"), row("top", 1e9, "c")]
    status = {"status": "failed", "reason": "", "seconds": 1.0}
    engine = {"same": 5, "requests": 6, "graphs": "CUDAGraphMode.FULL_DECODE_ONLY"}
    text, further = check.summary(
        {
            "kernels": {**status, "rows": rows, "facts": {}},
            "chunked": {**status, "rows": [{"gap": 0.02}], "facts": engine},
        }
    )
    assert re.search(r"append +0\.5 +0\.01 +NO +b", text)
    assert re.search(r"top +1000000000 +0\.01 +NO +c", text)
    assert re.search(r"chunked +5/6 +1 +0\.02 +FULL_DECODE_ONLY", text)
    assert not further["passed"]


# The kernels, interpreted.


def test_kernel_parity_runs_in_the_interpreter(tmp_path):
    """As the program runs it; the same arguments without --tiny and --device are the real thing."""
    pytest.importorskip("triton")
    arguments = ["--tiny", "--device", "cpu", "--only", "kernels", "--out", str(tmp_path)]
    assert check.main(arguments) == 0
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    rows = result["stages"]["kernels"]["rows"]
    assert {row["kernel"] for row in rows} >= {
        "append",
        "select slots",
        "whole step",
        "whole stage 1",
        "select blocks, Forecast",
        "select blocks, softmax",
        "resolve",
        "copy pieces",
        "paged steps",
        "attend frames",
        "attend part, causal",
        "attend part, chosen",
        "write tokens",
        "update windows",
    }
    assert all(row["ok"] for row in rows)
    assert result["passed"]
    assert result["sanitizer_errors"] is None


def test_kernel_parity_notices_a_wrong_kernel(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import attention

    from benchmarks.gpu import parity, parity_sparda

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(parity_sparda, "TINY", ())
    right = attention.attend_slots

    def wrong(cache, query, output, **arguments):
        right(cache, query, output, **arguments)
        output[-1, -1] *= 0.5

    wrong.__signature__ = inspect.signature(right)
    monkeypatch.setattr(attention, "attend_slots", wrong)
    options = options_of(tmp_path, "--tiny", "--device", "cpu")
    report = stages.Report(tmp_path / "kernels.json")
    with pytest.raises(stages.CheckFailedError, match="attend slots"):
        parity.check(report, options)
    failed = {row["kernel"] for row in report.rows if not row["ok"]}
    assert failed == {"attend slots", "attend all"}


def sparda_failures(monkeypatch) -> set[str]:
    """Kernels that differ in a tiny case."""
    import torch

    from benchmarks.gpu import parity_sparda

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)
    found = parity_sparda.differences(parity_sparda.TINY[0], device, generator, graphs=True)
    return {name for name, error, limit in found if error > limit}


def test_sparda_parity_notices_a_piece_that_is_not_copied(monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import sparda_paging

    right = sparda_paging.copy_pieces

    def wrong(target, target_index, source, source_index, count):
        right(target, target_index, source, source_index, (count - 1).clamp(min=0))

    monkeypatch.setattr(sparda_paging, "copy_pieces", wrong)
    assert sparda_failures(monkeypatch) == {"copy pieces", "paged steps"}


def test_sparda_parity_notices_wrong_choices_and_tables(monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import sparda_paging, sparda_select, sparda_tokens

    def marked(table, wanted, step, error, right=sparda_paging.resolve):
        result = right(table, wanted, step, error)
        table.recent[-1] = False
        return result

    def unlike(compressed, vectors, *rest, right=sparda_select.select_blocks, **options):
        return right(compressed, vectors.flip(0), *rest, **options)

    def host_only(host, slab, frame_of, *rest, right=sparda_tokens.write_tokens):
        right(host, slab, frame_of.fill_(-1), *rest)

    monkeypatch.setattr(sparda_paging, "resolve", marked)
    monkeypatch.setattr(sparda_select, "select_blocks", unlike)
    monkeypatch.setattr(sparda_tokens, "write_tokens", host_only)
    expected = {"resolve", "select blocks, Forecast", "select blocks, softmax", "write tokens"}
    assert sparda_failures(monkeypatch) == expected


def test_sparda_kernels_are_timed_in_the_interpreter(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import kernels_sparda

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = stages.Report(tmp_path / "kernels-sparda.json")
    kernels_sparda.measure(report, options_of(tmp_path, "--tiny", "--device", "cpu"))
    assert not any("error" in row for row in report.rows)
    assert len(report.rows) == 3 + len(kernels_sparda.PROGRAMS)
    assert {row["misses"] for row in report.rows if "misses" in row} == {4}


def test_rocketkv_kernels_are_timed_in_the_interpreter(tmp_path, monkeypatch):
    """What one kernel lacks, or the set-up of others, costs nothing else."""
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import compaction, pages

    from benchmarks.gpu import kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = stages.Report(tmp_path / "kernels.json")
    options = options_of(tmp_path, "--tiny", "--device", "cpu")
    kernels.measure(report, options)
    assert not any("error" in row for row in report.rows)
    every = [row["kernel"] for row in report.rows]
    assert len(every) == 10

    def fails(**_):
        raise LookupError("no such\nresources")

    for module, name in ((compaction, "compact_tokens"), (pages, "select_slots")):
        fails.__signature__ = inspect.signature(getattr(module, name))
        monkeypatch.setattr(module, name, fails)
    report = stages.Report(tmp_path / "again.json")
    kernels.measure(report, options)
    found = {row["kernel"]: row.get("error", "") for row in report.rows}
    problem = "LookupError: no such resources"
    assert found["select slots"] == found["decode"] == found["compact tokens"] == problem
    assert not any(found[name] for name in ("append", "score pages", "score prompt"))


if __name__ == "__main__":
    chosen = argparse.ArgumentParser()
    stages.add_options(chosen, "tried")
    sys.exit(
        stages.main("tests.test_gpu_programs", "tried", chosen, plan, lambda results: ("", {}))
    )
