# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Real servers of several processes, and a real Prometheus: ``make metrics-check``.

Too slow for the suite, so pytest collects it only by name.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.engine import BLOCK_SIZE, NEW_TOKENS, SETTINGS, SPARDA_SETTINGS, run_engine
from support.prometheus import Prometheus, promtool
from support.server import Server, add_tokenizer

from scripts.pages import metrics as pages

BACKENDS = {"rocketkv": SETTINGS, "sparda": {**SPARDA_SETTINGS, "slab_gib": None, "dense_len": 64}}
SHORT = 50  # tokens of prompts that both serve densely
EMPTY: set[str] = set()  # queries that these servers have no answer to


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(llama, folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def asked(prompts):
    """Six long prompts and two short ones, of which no two begin alike.

    What two requests of a step read of one block is looked up once, so that it would depend on who
    meets whom.
    """
    unlike = [prompt[:: 1 - 2 * (i % 2)] for i, prompt in enumerate(prompts)]
    return [*unlike, *(prompt[-SHORT:] for prompt in prompts[:2])]


def serve(model, log, backend, *arguments, **changes) -> Server:
    settings = json.dumps({"vllm_sparse": {**BACKENDS[backend], **changes}})
    return Server(
        model, log, "--attention-backend", backend, "--additional-config", settings, *arguments,
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def complete(server, prompt):
    """One request, over a connection of its own, which any API server may answer."""
    body = {
        "model": "m", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    return urllib.request.urlopen(request, timeout=300).read()


SAME = {
    "rocketkv": (
        "requests", "dense_fallbacks/short_prompt", "decode_rows", "visible_tokens",
        "selected_tokens", "prompts_compacted", "blocks_evicted",
    ),
    "sparda": (
        "requests", "dense_fallbacks/shorter_than_dense_len", "decode_rows", "visible_blocks",
        "selected_blocks",
    ),
}  # fmt: skip
PARALLEL = ("--tensor-parallel-size", "2", "--data-parallel-size", "2")


def series(name: str) -> str:
    stem, _, reason = name.partition("/")
    return f"vllm:sparse_{stem}_total{reason and '/'}{reason}"


@pytest.mark.parametrize(
    ("backend", "arguments", "engines", "ranks"),
    [
        pytest.param("rocketkv", PARALLEL, 2, 2, id="rocketkv-tp2-dp2-api2"),
        pytest.param("sparda", PARALLEL, 2, 2, id="sparda-tp2-dp2-api2"),
        pytest.param(
            "rocketkv", ("--data-parallel-size", "2", "--api-server-count", "1"), 2, 1,
            id="rocketkv-dp2-api1",
        ),
        pytest.param("sparda", ("--api-server-count", "2"), 1, 1, id="sparda-api2"),
    ],
)  # fmt: skip
def test_several_processes_count_what_one_does(
    model, asked, tmp_path, backend, arguments, engines, ranks
):
    options = {"rocketkv": {"block_size": BLOCK_SIZE}, "sparda": {"max_num_seqs": 8}}[backend]
    settings = BACKENDS[backend]
    run = run_engine(model, asked, settings=settings, backend=backend, **options)
    expected = run["counters"]
    with serve(model, tmp_path / "log", backend, *arguments) as server:
        with ThreadPoolExecutor(len(asked)) as pool:
            list(pool.map(lambda prompt: complete(server, prompt), asked))
        time.sleep(2)  # vLLM records and logs after it has answered
        for _ in range(4):  # whoever answers
            found = server.metrics()
            assert {name: found[series(name)] for name in SAME[backend]} == {
                name: expected[name] for name in SAME[backend]
            }
        print({name: found[series(name)] for name in SAME[backend]})
        if backend == "rocketkv":
            assert found["vllm:sparse_blocks_saved"] == 0
        else:
            layers, heads, dim = 3, 2, 32
            pieces = sum(found[series(f"frame_{kind}")] for kind in ("hits", "misses"))
            assert pieces == expected["selected_blocks"] * heads * layers
            computed = found["vllm:prompt_tokens_total"] - found["vllm:prefix_cache_hits_total"]
            written = computed + len(asked) * (NEW_TOKENS - 1)
            assert found[series("device_to_host_bytes")] == written * layers * heads * dim * 2 * 4
            pools = found["vllm:sparse_host_pool_bytes"] / (SPARDA_SETTINGS["host_gib"] * 2**30)
            assert round(pools, 1) == engines * ranks
        lines = re.findall(r"Sparse: (\d+) reqs, Dense: (\d+)", server.log.read_text())
        assert [sum(int(line[kind]) for line in lines) for kind in (0, 1)] == [6, 2]


def numbers(answer) -> list[float]:
    values = [float(series["value"][1]) for series in answer["data"]["result"]]
    return [value for value in values if value == value]


def test_every_query_is_answered_by_servers_under_load(model, asked, tmp_path):
    with (
        serve(model, tmp_path / "rocketkv", "rocketkv") as rocketkv,
        # Sparse prompts in two chunks, so that the second one sees blocks.
        serve(model, tmp_path / "sparda", "sparda", "--max-num-batched-tokens", "512",
              sparse_prefill=True) as sparda,
    ):  # fmt: skip
        servers = (rocketkv, sparda)
        ports = [int(server.url.rpartition(":")[2]) for server in servers]
        with Prometheus(tmp_path / "prometheus", ports, pages.ALERTS) as prometheus:
            end = time.monotonic() + 25
            while time.monotonic() < end:
                with ThreadPoolExecutor(8) as pool:
                    for server in servers:
                        list(pool.map(lambda prompt, s=server: complete(s, prompt), asked[2:]))
            silent = {}
            for panel in pages.dashboard():
                for target in panel["targets"]:
                    answer = prometheus.query(filled(target["expr"]))
                    found = numbers(answer)
                    where = f"{panel['title']}: {target['legendFormat']}"
                    print(f"{where:60} {len(found)} series {[f'{x:.4g}' for x in found[:3]]}")
                    if not found:
                        silent[where] = target["expr"]
            assert set(silent) == EMPTY, silent
            rules = prometheus.rules()
            assert {rule["name"] for rule in rules} == {rule["alert"] for rule in pages.rules()}
            assert {rule["health"] for rule in rules} == {"ok"}


def filled(query: str) -> str:
    """What Grafana makes of a query where everything is chosen."""
    for name, value in {"$job": ".*", "$instance": ".*", "$__rate_interval": "20s"}.items():
        query = query.replace(name, value)
    return query


# What makes each alert fire, and what must not: per minute, or a gauge's value.
ALARMING = {
    "VllmSparseAbsent": {
        "vllm:num_requests_running": ("1x90", "1x90"), "pool_blocks": (None, "9x90"),
    },
    "VllmSparseServesDensely": {
        "dense_fallbacks_total": ("0+95x90", "0+85x90"), "requests_total": ("0+5x90", "0+15x90"),
    },
    "VllmSparsePreempts": {
        "vllm:num_preemptions_total": ("0+12x90", "0+3x90"), "pool_blocks": ("9x90", "9x90"),
    },
    "VllmSparseMisses": {
        "frame_misses_total": ("0+40x90", "0+20x90"), "frame_hits_total": ("0+60x90", "0+80x90"),
    },
    "VllmSparseFetchesLate": {
        "prefetch_late_total": ("0+30x90", "0+10x90"), "prefetch_issued_total": ("0+100x90",) * 2,
    },
    "VllmSparseExposedWait": {"exposed_wait_seconds_total": ("0+12x90", "0+3x90")},
}  # fmt: skip


def test_every_alert_fires_where_it_should_and_only_there(tmp_path):
    promtool("check", "rules", str(pages.ALERTS))
    rules = {rule["alert"]: rule for rule in pages.rules()}
    assert set(ALARMING) == set(rules)
    tests = []
    for alert, given in ALARMING.items():
        rule = rules[alert]
        series = [
            {"series": f'{name}{{job="vllm", instance="{instance}"}}', "values": values[kind]}
            for stem, values in given.items()
            for kind, instance in enumerate(("bad", "good"))
            if values[kind]
            for name in [stem if stem.startswith("vllm:") else f"vllm:sparse_{stem}"]
        ]
        labels = {"job": "vllm", "instance": "bad", **rule["labels"]}
        notes = {
            key: text.replace("{{ $labels.instance }}", "bad")
            for key, text in rule["annotations"].items()
        }
        fired = [{"exp_labels": labels, "exp_annotations": notes}]
        expected = [{"eval_time": "80m", "alertname": alert, "exp_alerts": fired}]
        tests.append({"interval": "1m", "input_series": series, "alert_rule_test": expected})
    cases = {"rule_files": [str(pages.ALERTS)], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yml").write_text(json.dumps(cases))  # which is YAML, too
    promtool("test", "rules", str(tmp_path / "cases.yml"))
