# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Long generations in an engine that is looked into while it runs, stopped and aborted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SAMPLED = 250  # tokens at temperature 1


def serve(job: dict[str, Any]) -> None:
    """Does what a job says, for :func:`support.forked.run_forked`.

    Args:
        job: ``llm`` (arguments of ``LLM``), ``prompts``, ``new_tokens``, ``every`` (steps between
            comparisons of what is derived from keys with a rebuild from scratch) and ``result``, a
            file that gets ``tokens``, ``compared`` (numbers, all of which were equal),
            ``preempted_at`` (generated tokens of requests that were preempted), ``free`` (blocks:
            before, after all are finished, after stops and aborts), ``stopped`` and ``again``
            (tokens of a request that met its stop token, and those after aborts), and ``sampled``
            (tokens at temperature 1 after the beginnings of all prompts but the first, each
            request with a seed of its own). Where ``stops`` is false, neither stops nor aborts
            are tried, and what comes after them is left out.
    """
    from vllm import LLM

    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, dtype="float32", seed=0, **job["llm"])
    driver = _Driver(llm, job["every"])
    prompts, result = job["prompts"], {"free": [driver.free()]}
    result["tokens"] = driver.finish([driver.add(p, job["new_tokens"]) for p in prompts])
    result["free"].append(driver.free())
    if job.get("stops", True):
        _stop_and_abort(driver, job, result)
    result |= {"compared": driver.compared, "preempted_at": driver.preempted_at}
    Path(job["result"]).write_text(json.dumps(result))


def _stop_and_abort(driver: _Driver, job: dict[str, Any], result: dict[str, Any]) -> None:
    """One ends by a stop token, one is aborted while it decodes, one in its prompt."""
    prompts, first = job["prompts"], result["tokens"][0]
    end = next(i for i in range(len(first) // 3, len(first)) if first[i] not in first[:i])
    stopping = driver.add(prompts[0], job["new_tokens"], stop=first[end])
    decoding, waiting = driver.add(prompts[1], 400), None
    for step in range(end + 1):
        if step == 37:
            waiting = driver.add(prompts[2][::-1], 400)
        driver.step()
        if step == 38:
            assert not driver.tokens[waiting], "its prompt has been read"
            driver.abort(waiting)
        if step == 77:
            driver.abort(decoding)
    result["stopped"] = [driver.finish([stopping])[0], end]
    result["free"].append(driver.free())
    result["again"] = driver.finish([driver.add(prompt, 40) for prompt in prompts])
    # Read in one step: on CPUs vLLM ends with an error where a seeded prompt is read in parts.
    seeded = [driver.add(prompt[:40], SAMPLED, seed=n) for n, prompt in enumerate(prompts[1:])]
    result["sampled"] = driver.finish(seeded)


class _Driver:
    """Steps an engine in this process.

    Attributes:
        tokens: What each request has generated.
        compared: Numbers that were compared with a rebuild.
        preempted_at: Tokens that requests had generated when they were preempted.
    """

    def __init__(self, llm: Any, every: int) -> None:
        self._engine, self._every, self._steps = llm.llm_engine, every, 0
        core = self._engine.engine_core.engine_core
        self._scheduler = core.scheduler
        runner = core.model_executor.driver_worker.worker.model_runner
        backend = llm.llm_engine.vllm_config.attention_config.backend
        layers = list(runner.vllm_config.compilation_config.static_forward_context.values())
        parts = {None: _nothing, "ROCKETKV": _page_index, "SPARDA": _windows}
        self._derived = parts[backend and backend.name]
        self._layers = layers
        self.tokens: dict[str, list[int]] = {}
        self.compared = 0
        self.preempted_at: list[int] = []

    def add(
        self, prompt: list[int], count: int, stop: int | None = None, seed: int | None = None
    ) -> str:
        """Starts a request, at temperature 1 if it has a seed; returns its name."""
        from vllm import SamplingParams

        name = str(len(self.tokens))
        self.tokens[name] = []
        params = SamplingParams(
            max_tokens=count, temperature=float(seed is not None), seed=seed,
            ignore_eos=stop is None, detokenize=False,
            stop_token_ids=None if stop is None else [stop],
        )  # fmt: skip
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def abort(self, name: str) -> None:
        self._engine.abort_request([name])

    def step(self) -> None:
        running = {request.request_id: request for request in self._scheduler.running}
        before = {name: request.num_preemptions for name, request in running.items()}
        for output in self._engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
        for name, request in running.items():
            if request.num_preemptions > before[name]:
                self.preempted_at.append(request.num_output_tokens)
        self._steps += 1
        if self._steps % self._every == 0:
            self._compare()

    def finish(self, names: list[str]) -> list[list[int]]:
        while self._engine.has_unfinished_requests():
            self.step()
        return [self.tokens[name] for name in names]

    def free(self) -> int:
        return self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def _compare(self) -> None:
        """What is derived from the keys of generated tokens, with a rebuild from all keys."""
        for request in self._scheduler.running:
            if request.num_computed_tokens <= request.num_prompt_tokens:
                continue
            (blocks,) = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
            lengths = request.num_prompt_tokens, request.num_computed_tokens
            for found, expected in self._derived(self._layers, torch.tensor(blocks), *lengths):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
                self.compared += found.numel()


def _nothing(*_: Any) -> list[Any]:
    return []


def _page_index(
    layers: list[Any], blocks: Tensor, prompt_len: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Extrema of every page of a request's kept and generated tokens."""
    from vllm_sparse.policies.pages import page_extrema

    for layer in layers:
        sparse, cache = layer.impl.sparse, layer.kv_cache
        retention = sparse.policy.retention(prompt_len)
        if not retention.sparse:
            return
        layout = sparse.layouts[retention.page_size]
        held = count - retention.dropped_blocks * layout.block_size
        own = blocks[retention.dropped_blocks :]
        keys = layout.tokens(cache)[own].transpose(0, 1).flatten(1, 2)[:, :held, : layout.head_dim]
        expected = torch.cat(page_extrema(keys, layout.page_size), -1)
        found = layout.index(cache)[own].permute(1, 0, 3, 2).flatten(1, 2)
        yield found[:, : expected.shape[1]], expected


def _windows(
    layers: list[Any], blocks: Tensor, prompt_len: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compressed keys of every complete window of a request."""
    from vllm_sparse.kernels.reference.sparda_tokens import mean_of_windows

    for layer in layers:
        own = layer.impl.layer
        runtime, stride = own.runtime, own.runtime.settings.kernel_stride
        runtime.pager.check_integrity()
        host = own.pager.host[blocks]
        rows = host.transpose(1, 2).flatten(0, 1)[:count, :, : host.shape[-1] // 2]
        windows = rows.unfold(0, 2 * stride, stride).permute(0, 3, 1, 2)
        stored = runtime.compressed(own.number)[blocks].transpose(1, 2).flatten(0, 1)
        yield stored[1 : 1 + len(windows)], mean_of_windows(windows)
