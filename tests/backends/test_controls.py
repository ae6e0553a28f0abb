# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Requests that ask to be dense beside others that do not, in whole engines on a CPU.

Dense ones are compared with stock vLLM; the others with ``sparse_run``, which is compared with
Hugging Face in ``test_policy_cpu``. Of each pair of prompts that begin alike, one is dense.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.engine import BLOCK_SIZE, DENSE, NEW_TOKENS, SETTINGS, run_engine
from support.masked import assert_tokens_of_hugging_face, policy_of

pytest.importorskip("vllm")
from vllm_sparse.backends import controls as controls_of_runner
from vllm_sparse.backends import prompts as prompts_of_runner
from vllm_sparse.backends.controls import controls, replayed, watch_controls
from vllm_sparse.control import DENSE as AS_DENSE

pytestmark = pytest.mark.vllm


@pytest.fixture(params=["V1", "V2"])
def runners(request, monkeypatch):
    """Two in one process, each with a request that asks to be dense, and what their steps see.

    That of the second comes back with outputs.
    """
    from support.runner import PROMPT, table_of, take_up
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    v2 = request.param == "V2"
    common = SimpleNamespace(
        num_reqs=1, rswa_prefix_lens=torch.tensor([300]), req_idx=None,
        is_prefilling=torch.tensor([True]),
    )  # fmt: skip
    kind = RunnerV2 if v2 else RunnerV1
    see = lambda self: (controls(common), prompts_of_runner.table_at_work(), replayed(common))  # noqa: E731
    monkeypatch.setattr(kind, "execute_model", see)
    monkeypatch.setattr(RunnerV2, "add_requests", lambda *_: None)
    monkeypatch.setattr(InputBatch, "add_request", lambda *_: None)
    model = SimpleNamespace(is_hybrid=False)
    watch_controls(SimpleNamespace(use_v2_model_runner=v2, model_config=model))
    made = []
    for outputs in (0, 5):
        runner, new = kind.__new__(kind), SimpleNamespace(req_id="a")
        new.sampling_params = SimpleNamespace(extra_args=DENSE)
        if v2:
            runner.req_states = table_of(monkeypatch)
            take_up(runner.req_states, "a", outputs)
            common.req_idx = np.array([runner.req_states.req_id_to_index["a"]])
            runner.add_requests(SimpleNamespace(scheduled_new_reqs=[new]))
        else:
            runner.input_batch = InputBatch.__new__(InputBatch)
            runner.input_batch._req_ids, runner.input_batch.req_id_to_index = ["a"], {"a": 0}
            runner.input_batch.num_prompt_tokens = np.array([PROMPT])
            runner.input_batch.num_tokens_no_spec = np.array([PROMPT + outputs])
            runner.input_batch.add_request(new)
        made.append(runner)
    return made


def test_each_of_two_runners_in_one_process_sees_its_own_requests(runners):
    for runner in (*runners, *runners):
        asked, table, back = runner.execute_model()
        assert asked.tolist() == [AS_DENSE]
        assert back.tolist() == [runner is runners[1]]
        assert table is getattr(runner, "req_states", table)
    first, second = runners
    part = "req_states" if hasattr(first, "req_states") else "input_batch"
    del getattr(second, part)._vllm_sparse
    assert second.execute_model()[0] is None
    assert first.execute_model()[0] is not None


class Table(SimpleNamespace):
    """A runner's requests: a table of Model Runner V2, a batch of V1."""


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_who_takes_a_row_or_a_name_over_asks_anew(monkeypatch, v2):
    table = Table(max_num_reqs=4, req_id_to_index={"a": 1})
    monkeypatch.setattr(prompts_of_runner, "_at_work", weakref.ref(table))
    index = np.array([0, 1]) if v2 else None
    rows = {"num_reqs": 3, "rswa_prefix_lens": torch.tensor([300, 300, 0]), "req_idx": index}

    def asked(**changes):
        found = controls(SimpleNamespace(**{**rows, **changes}))
        return None if found is None else found.tolist()

    def come(name, extra_args=None):
        new = SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra_args))
        if v2:
            scheduled = SimpleNamespace(scheduled_new_reqs=[new])
            controls_of_runner._note_new(SimpleNamespace(req_states=table), scheduled)
        else:
            controls_of_runner._note_row(table, new)

    come("a", DENSE)
    assert asked() == [0, AS_DENSE, 0]
    assert asked(rswa_prefix_lens=None) is None  # a dummy run, whose rows are nobody's
    assert asked(num_reqs=1) is None
    come("a")
    assert asked() is None
    come("a", DENSE)
    table.req_id_to_index = {"b": 1}
    come("b")
    assert asked() is None


@pytest.mark.parametrize("prefilling", [True, False])
def test_who_came_with_outputs_is_told_beside_prompts_only(monkeypatch, prefilling):
    """Where all rows decode, a step would look it up for nobody."""
    table = Table(num_tokens_no_spec=np.array([9, 9]), num_prompt_tokens=np.array([5, 9]))
    monkeypatch.setattr(prompts_of_runner, "_at_work", weakref.ref(table))
    common = SimpleNamespace(
        num_reqs=3, rswa_prefix_lens=torch.tensor([5, 9, 0]), req_idx=None,
        is_prefilling=torch.tensor([prefilling, False, False]),
    )  # fmt: skip
    back = replayed(common)
    assert (back is not None and back.tolist()) == (prefilling and [True, False, False])


def expected(asked, sparse_run, stock_run, new_tokens=NEW_TOKENS):
    """Tokens of a wave."""
    runs = [stock_run if extra else sparse_run for extra in asked]
    return [run["tokens"][0][i][:new_tokens] for i, run in enumerate(runs)]


def test_both_kinds_share_batches_and_prefixes(llama, prompts, sparse_run, stock_run):
    """In chunks; what was dense in the first wave is sparse in the second, and the reverse."""
    first, second = [None, DENSE] * 3, [DENSE, None] * 3
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=100,
        waves=2, asked=[*first, *second],
    )  # fmt: skip
    assert run["tokens"] == [expected(asked, sparse_run, stock_run) for asked in (first, second)]
    policy = policy_of()
    dropped = [policy.retention(len(prompt)).dropped_blocks for prompt in prompts]
    # What a dense request finds of a sparse one is all of its prompt: the tail was copied.
    hits = [n if i % 2 else (len(prompts[i]) - 1) // BLOCK_SIZE for i, n in enumerate(dropped)]
    assert run["cached"][1] == [BLOCK_SIZE * n for n in hits]

    counters = run["counters"]
    assert counters["blocks_evicted"] == sum(dropped)  # each prompt was sparse once
    assert counters["prompts_compacted"] == counters["dense_fallbacks/requested"] == len(prompts)
    assert counters["decode_rows"] == len(prompts) * (NEW_TOKENS - 1)
    assert run["free_blocks"][0] == run["free_blocks"][1]


@pytest.mark.parametrize(("caching", "chunk"), [(True, 2048), (False, 100)])
def test_a_preempted_request_keeps_what_it_asked_for(
    llama, prompts, sparse_run, stock_run, caching, chunk
):
    """Decoding, or in its prompt; without a prefix cache only its name tells the scheduler."""
    asked = [None, DENSE] * 3
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, num_gpu_blocks_override=60,
        scheduler_reserve_full_isl=False, enable_prefix_caching=caching, asked=asked,
        max_num_batched_tokens=chunk, new_tokens=60,
    )  # fmt: skip
    assert run["tokens"][0] == expected(asked, sparse_run, stock_run, 60)
    assert run["preemptions"] > 0
    if caching:
        assert run["counters"]["dense_fallbacks/requested"] == 3  # a resumed one but once
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_budgets_share_batches_and_prefixes(llama, prompts, sparse_run, stock_run):
    """More and less than the server's, beside dense requests, in chunks and preempted."""
    more, less = ({"vllm_sparse.token_budget": tokens} for tokens in (128, 32))
    first, second = [None, more, DENSE, less, more, None], [less, None, None, more, None, DENSE]
    run = run_engine(
        llama, prompts, settings={**SETTINGS, "max_token_budget": 128}, block_size=BLOCK_SIZE,
        max_num_batched_tokens=100, num_gpu_blocks_override=70, scheduler_reserve_full_isl=False,
        waves=2, new_tokens=40, asked=[*first, *second],
    )  # fmt: skip
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
    tokens = [*run["tokens"][0], *run["tokens"][1]]
    requests = list(zip([*first, *second], [*prompts, *prompts], tokens, strict=True))
    for asked, prompt, got in requests:
        i = prompts.index(prompt)
        if asked in (None, DENSE):
            calm = stock_run if asked else sparse_run
            assert got == calm["tokens"][0][i][:40]
        else:
            assert got != sparse_run["tokens"][0][i][:40]
    for extra in (more, less):
        mine = [(prompt, got) for asked, prompt, got in requests if asked == extra]
        budget = extra["vllm_sparse.token_budget"]
        assert_tokens_of_hugging_face(llama, *zip(*mine, strict=True), token_budget=budget)
