# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``vllm serve`` with the plugin, as a stranger uses it: the openai client and ``/metrics``.

Last comes a round of the soak, for which the pool is small, and whose end is the server's.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.engine import NEW_TOKENS, SETTINGS, SPARDA_SETTINGS
from support.examples import example
from support.server import Server, add_tokenizer

from benchmarks.soak import crash, serving, storm, traffic, watch
from benchmarks.soak.client import Client

if TYPE_CHECKING:
    from pathlib import Path

openai = pytest.importorskip("openai")
pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


LONGEST = 2048
BACKENDS = {
    "rocketkv": {**SETTINGS, "min_context": LONGEST // 8},  # a crowd's prompts keep their blocks
    "sparda": {
        **SPARDA_SETTINGS,
        "slab_gib": serving.subject("SPARDA", LONGEST).settings["slab_gib"],
    },
}
BLOCKS = serving.subject("ROCKETKV", LONGEST).blocks


@pytest.fixture(scope="module", params=BACKENDS)
def server(request, llama: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("served")
    model = folder / "model"
    shutil.copytree(llama, model)
    add_tokenizer(model)
    with Server(
        model, folder / "log", "--attention-backend", request.param, "--additional-config",
        json.dumps({"vllm_sparse": BACKENDS[request.param]}), "--max-model-len", str(LONGEST),
        "--num-gpu-blocks-override", str(BLOCKS),
        *serving.PROBED, env=serving.ENVIRONMENT,
    ) as running:  # fmt: skip
        running.backend = request.param
        yield running


@pytest.fixture(scope="module")
def expected(server, request):
    """What the same requests gave in the engine."""
    run = request.getfixturevalue(
        {"rocketkv": "sparse_run", "sparda": "sparda_run"}[server.backend]
    )
    return run["tokens"][0]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _complete(client, prompt, n=1, **asked):
    # vLLM wants real sampling for n > 1; of the single best token it is deterministic.
    sampling = {"temperature": 1.0, "top_k": 1} if n > 1 else {"temperature": 0.0}
    return client.completions.create(
        model="m", prompt=prompt, max_tokens=NEW_TOKENS, n=n,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": asked,
                    **sampling},
    )  # fmt: skip


def test_the_start_up_line_says_what_runs(server):
    log = server.log.read_text()
    if server.backend == "sparda":
        (line,) = re.findall(r"SPARDA: selector.*", log)
        assert "lookahead-query, 6 blocks of 32 tokens" in line
        assert f"host pool 0.00 GiB for {BLOCKS - 1} blocks" in line  # one is the null block
        assert re.search(r"device slab 0.00\d GiB, 96 frames a layer", line)
        assert "fetched a layer ahead" in line
        return
    (line,) = re.findall(r"ROCKETKV: stage.*", log)
    assert "token budget 64" in line
    assert "block size 32" in line
    assert "decode kernel: cpu" in line
    assert re.search(r"a prompt of 2048 tokens keeps (\d+) of 64 blocks", line)
    assert re.search(r"KV blocks hold [\d.]+ decoding requests of 2048 tokens", log)


def test_concurrent_served_requests_equal_the_engine(client, prompts, expected):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: _complete(client, prompt), prompts))
    assert [answer.choices[0].token_ids for answer in answers] == expected


def test_several_samples_of_one_prompt_share_it(client, prompts, expected):
    answer = _complete(client, prompts[0], n=3)
    for choice in answer.choices:
        assert choice.token_ids == expected[0]


def test_metrics_reach_the_api_server(client, server, prompts):
    before = server.metrics()
    assert before["vllm:sparse_pool_blocks"] > 64
    _complete(client, prompts[1])
    _complete(client, prompts[1][:50])
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    rows = NEW_TOKENS - 1
    if server.backend == "sparda":
        assert grown("vllm:sparse_requests_total") == 2
        assert grown("vllm:sparse_decode_rows_total") == 2 * rows
        pieces = grown("vllm:sparse_frame_hits_total") + grown("vllm:sparse_frame_misses_total")
        assert pieces == grown("vllm:sparse_selected_blocks_total") * 2 * 3  # KV heads, layers
        assert grown("vllm:sparse_device_to_host_bytes_total") > 0
        block_bytes = 3 * 2 * 32 * 2 * 32 * 4  # layers, KV heads, tokens, keys and values
        assert after["vllm:sparse_host_pool_bytes"] == BLOCKS * block_bytes
        assert 0 < after["vllm:sparse_slab_frames_in_use"] <= after["vllm:sparse_slab_frames"]
        return
    assert grown("vllm:sparse_requests_total") == 1
    assert grown("vllm:sparse_decode_rows_total") == rows
    assert grown("vllm:sparse_selected_tokens_total") == rows * SETTINGS["token_budget"] // 2
    assert grown("vllm:sparse_visible_tokens_total") == sum(
        len(prompts[1]) + 1 + i for i in range(rows)
    )
    assert grown("vllm:sparse_blocks_evicted_total") > 0  # counted by the scheduler's process
    assert grown("vllm:sparse_prompts_compacted_total") == 1
    assert grown("vllm:sparse_dense_fallbacks_total/short_prompt") == 1


def test_the_log_says_what_was_counted_once(client, server, prompts):
    """Every line of the log has the name of the process that wrote it."""
    for prompt in (prompts[1], prompts[0][:50]):
        _complete(client, prompt)
    deadline = time.monotonic() + 120
    logged, counted = (0, 0), None
    while logged != counted:  # the log lags by its interval
        assert time.monotonic() < deadline, f"{logged} was logged of {counted}"
        time.sleep(0.2)
        values = server.metrics().items()
        names = "vllm:sparse_requests_total", "vllm:sparse_dense_fallbacks_total"
        counted = tuple(sum(n for key, n in values if key.startswith(name)) for name in names)
        lines = re.findall(r"(.*: Sparse: .*)\n", server.log.read_text())
        found = [re.search(r"Sparse: (\d+) reqs, Dense: (\d+) reqs", line) for line in lines]
        logged = tuple(sum(int(match[kind]) for match in found) for kind in (1, 2))
    assert all(line.startswith("(APIServer") for line in lines)
    assert logged[0] > 0
    if server.backend == "rocketkv":
        assert logged[1] > 0
        assert "KV blocks freed: " in "".join(lines)
        assert "decode read " in "".join(lines)


def test_a_request_may_ask_to_be_dense(client, server, prompts, expected, stock_run):
    name = "vllm:sparse_dense_fallbacks_total/requested"
    before, dense = server.metrics().get(name, 0.0), {"vllm_sparse.sparse": False}
    with ThreadPoolExecutor(3) as pool:
        sparse = pool.submit(_complete, client, prompts[0])
        alike = pool.submit(_complete, client, prompts[1], **dense)
        samples = pool.submit(_complete, client, prompts[2], n=2, **dense)
    assert sparse.result().choices[0].token_ids == expected[0]
    stock = stock_run["tokens"][0]
    assert alike.result().choices[0].token_ids == stock[1]
    assert [choice.token_ids for choice in samples.result().choices] == [stock[2]] * 2
    assert server.metrics()[name] == before + 3


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"vllm_sparse.sparse": "no"}, "'no' is neither true nor false"),
        ({"vllm_sparse.sparse": [0]}, "[0] is neither true nor false"),
        ({"vllm_sparse.spars": False}, "vllm_sparse.spars: unknown; a request may set"),
        ({"vllm_sparse.token_budget": "64"}, "'64' is no number of tokens"),
        (
            {"vllm_sparse.token_budget": 65},
            {
                "rocketkv": "65 is more than the 64 that this server allows",
                "sparda": "SPARDA has frames for top_k blocks",
            },
        ),
        (
            {"vllm_sparse.token_budget": 12},
            {
                "rocketkv": "vllm_sparse.token_budget: Input should be greater than or equal to 16",
                "sparda": "cannot be had here",
            },
        ),
    ],
)
def test_wrong_requests_get_a_400_that_says_why(client, server, asked, why):
    why = why if isinstance(why, str) else why[server.backend]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="m", prompt=[1], extra_body={"vllm_xargs": asked})
    assert why in refused.value.message


def test_an_aborted_request_gives_everything_back(client, server, prompts):
    for _ in range(5):  # it ends unseen where this process gets no processor meanwhile
        stream = client.completions.create(
            model="m", prompt=prompts[2], max_tokens=1500, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(iter(stream))
        # Told with a later step than the token's, perhaps.
        is_held = watch.until(lambda: server.metrics()["vllm:kv_cache_usage_perc"] > 0, 5)
        stream.close()
        if is_held:
            break
    assert is_held
    deadline = time.monotonic() + 120
    while server.metrics()["vllm:kv_cache_usage_perc"] > 0:
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.2)


class TestExamples:
    @pytest.fixture
    def document(self, server, tmp_path):
        if server.backend != "rocketkv":
            pytest.skip("clients do not know the backend")
        path = tmp_path / "document.txt"
        path.write_text(" ".join(f"w{7 * i % 1024}" for i in range(400)))
        return str(path)

    def test_questions_about_a_document(self, server, document, capsys):
        url = f"{server.url}/v1"
        example("document").main([document, "w5 w6", "w8", "--base-url", url])
        printed = capsys.readouterr().out
        assert re.findall("^> (.*)", printed, re.MULTILINE) == ["w5 w6", "w8"]
        assert len(re.findall(r"^\([\d.]+ s to the first token\)", printed, re.MULTILINE)) == 2

    def test_a_chat_grows(self, server, document, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("w1\nw2\n"))
        example("chat").main([document, "--base-url", f"{server.url}/v1"])
        first, second = re.findall(r"\((\d+) tokens of", capsys.readouterr().out)
        assert 400 < int(first) < int(second)


MUST_GROW = {
    "rocketkv": ("num_preemptions", "prefix_cache_hits", "sparse_blocks_evicted"),
    "sparda": ("num_preemptions", "prefix_cache_hits", "sparse_frame_misses"),
}


def test_a_storm_changes_no_answer_and_leaves_nothing(server):
    """And its engine is killed, so that nothing may come after it."""
    target = storm.Target(Client(server.url, "m"), server.metrics, LONGEST)
    findings = storm.Findings()
    before = server.metrics()

    def grown():
        after, names = server.metrics(), MUST_GROW[server.backend]
        return {name: after[f"vllm:{name}_total"] > before[f"vllm:{name}_total"] for name in names}

    for seed in (2, 3, 4):  # nobody is preempted where clients get no processor to come at once
        storm.round_of(target, traffic.plan(seed, 8, LONGEST), 16, findings)
        assert findings.faults == []
        if all(grown().values()):
            break
    assert all(grown().values()), grown()
    assert findings.counts["hung up"]
    assert findings.counts["compared with alone"] >= 12
    crash.kill_amid_answers(target, server.pid, "engine", findings)
    assert findings.faults == []
    # Counters and gauges of engine and worker, and shared memory between them.
    assert findings.counts["files gone after kill -9 of the engine"] > 4
