# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a worker can be told to do: functions of its engine, with arguments that JSON can say."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks import clock, live

if TYPE_CHECKING:
    from vllm import LLM

FREE = -1  # of a forced text: a token that the model chooses
SETTLING_STEPS = 3  # after the miss rate has changed


def complete(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[dict]:
    """Returns the greedy completions, and how many prompt tokens came from the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        {"text": output.outputs[0].text, "cached_tokens": output.num_cached_tokens or 0}
        for output in outputs
    ]


def forget(llm: LLM) -> None:
    """Empties the prefix cache."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied")


def force(
    llm: LLM, prompts: list[list[int]], forced: list[list[int]], record_to: list[str] | None = None
) -> list[list[int]]:
    """Generates given continuations and returns their tokens.

    Args:
        llm: Has the logits processor of `benchmarks.teacher`.
        prompts: Token ids.
        forced: Token ids that follow each, `FREE` where the model chooses.
        record_to: Files for the log-probabilities, if they are wanted.

    Raises:
        RuntimeError: The engine generated something else.
    """
    from benchmarks import teacher

    files = record_to or [None] * len(prompts)
    params = [teacher.sampling_params(*each) for each in zip(forced, files, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    for tokens, wanted in zip(found, forced, strict=True):
        pairs = zip(tokens, wanted, strict=False)
        if len(tokens) != len(wanted) or any(want not in (FREE, token) for token, want in pairs):
            raise RuntimeError("the engine did not generate the forced tokens")
    return found


def metrics(llm: LLM) -> dict[str, float]:
    """Returns every counter and gauge of vLLM and the plugin, by name (and reason, if any)."""
    from vllm_sparse.instance import instance_of
    from vllm_sparse.metrics import folder
    from vllm_sparse.metrics.published import merged

    values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    # The plugin's processes share theirs through files.
    for metric in merged(folder(instance_of(llm.llm_engine.vllm_config).name)):
        for sample in metric.samples:
            reason = sample.labels.get("reason")
            values[f"{sample.name}{{{reason}}}" if reason else sample.name] = sample.value
    return values


def counters(llm: LLM) -> dict[str, float]:
    """Returns the plugin's counters and gauges, and vLLM's counter of preemptions."""
    return of_the_plugin(metrics(llm), "vllm:num_preemptions")


def of_the_plugin(values: dict[str, float], *further: str) -> dict[str, float]:
    """Returns those metrics that the plugin counts, and further ones."""
    return {k: v for k, v in values.items() if k.startswith("vllm:sparse") or k in further}


def prefill(llm: LLM, prompt: list[int]) -> float:
    """Returns the seconds from adding a request to its first token."""
    return _until(llm, prompt, 1)[0]


def first_two(llm: LLM, prompt: list[int]) -> list[float]:
    """Returns the seconds from adding a request to its first token and to its second one.

    Policies that evict compact a prompt in the step of its second token, so the first is no
    measure of what they cost.
    """
    return _until(llm, prompt, 2)


def _until(llm: LLM, prompt: list[int], tokens: int) -> list[float]:
    start, seconds = time.perf_counter(), []
    _add(llm, [prompt], max_tokens=tokens)
    while llm.llm_engine.has_unfinished_requests():
        if llm.llm_engine.step():  # parts of a prompt give nothing
            seconds.append(time.perf_counter() - start)
    return seconds


def attach_clock(llm: LLM) -> None:
    """Times the attention layers from now on; see :func:`timed_prefill`."""
    llm.collective_rpc(clock.attach)


def timed_prefill(llm: LLM, prompt: list[int]) -> dict[str, float]:
    """Returns ``seconds`` as :func:`prefill`, and what `clock` found and the plugin counted."""
    llm.collective_rpc(clock.spent)
    before = counters(llm)
    seconds = prefill(llm, prompt)
    parts = llm.collective_rpc(clock.spent)[0]
    after = counters(llm)
    counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {"seconds": seconds, **parts, "counters": counted}


def begin(llm: LLM, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0) -> float:
    """Adds a batch of requests and returns the seconds until every one of them decodes."""
    start = time.perf_counter()
    waiting = set(_add(llm, prompts, max_tokens, temperature))
    while waiting:
        for output in llm.llm_engine.step():
            waiting.discard(output.request_id)
    return time.perf_counter() - start


def decode(llm: LLM, steps: int, batch: int, dropped: int = 0) -> list[float]:
    """Returns the seconds of each of `steps` steps, after `dropped` unmeasured ones.

    Raises:
        RuntimeError: A step did not give every request one token.
    """
    seconds = []
    for _ in range(dropped + steps):
        start = time.perf_counter()
        outputs = llm.llm_engine.step()
        seconds.append(time.perf_counter() - start)
        ended = sum(output.finished for output in outputs)
        if len(outputs) != batch or ended:
            raise RuntimeError(
                f"a step served {len(outputs)} of {batch} requests, of which {ended} ended"
            )
    return seconds[dropped:]


def stretch(llm: LLM, steps: int) -> dict:
    """Decodes one request; ``seconds`` of each step, and ``cpu``: those of this process in all."""
    before = time.process_time()
    seconds = decode(llm, steps, 1)
    return {"seconds": seconds, "cpu": time.process_time() - before}


def generate_once(llm: LLM, prompt: list[int], max_tokens: int) -> dict:
    """Generates for one prompt and returns what it cost from the first token on.

    ``tokens``, ``steps``, ``seconds``, CPU seconds of the model's process as ``cpu``, ``drafted``
    and ``accepted`` tokens, and the ``text``.
    """
    drafts = [f"vllm:spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted")]
    begin(llm, [prompt], max_tokens)
    counted, spent = metrics(llm), llm.collective_rpc(_cpu_seconds)[0]
    start, steps, last = time.perf_counter(), 0, None
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        steps, last = steps + 1, outputs[-1] if outputs else last
    after = metrics(llm)
    return {
        "tokens": len(last.outputs[0].token_ids) - 1,
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "cpu": llm.collective_rpc(_cpu_seconds)[0] - spent,
        **{
            key: after.get(name, 0) - counted.get(name, 0)
            for key, name in zip(("drafted", "accepted"), drafts, strict=True)
        },
        "text": last.outputs[0].text,
    }


def _cpu_seconds(worker: object) -> float:
    return time.process_time()


def finish(llm: LLM) -> None:
    """Aborts all requests; prefix cache and blocks stay as they are."""
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    while engine.has_unfinished_requests():
        engine.step()


def serve_all(llm: LLM, prompts: list[list[int]], max_tokens: int) -> dict:
    """Serves all requests; returns what the engine reported after each step, and all outputs."""
    engine, started = llm.llm_engine, time.perf_counter()
    _add(llm, prompts, max_tokens)
    steps, finished = [], {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for output in outputs:
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        gauges = metrics(llm)
        running = int(gauges["vllm:num_requests_running"])
        steps.append(
            {
                "running": running,
                "usage": gauges["vllm:kv_cache_usage_perc"],
                # Every running request got a token, so none of them is in prefill.
                "decoding": len(outputs) == running > 0,
            }
        )
    return {
        "steps": steps,
        "outputs": finished,
        "seconds": time.perf_counter() - started,
        "metrics": metrics(llm),
    }


def occupy(llm: LLM, prompts: list[list[int]], steps: int) -> dict:
    """Lets requests decode some steps and returns what they occupy meanwhile."""
    begin(llm, prompts, max_tokens=steps + 64 * len(prompts))
    decode(llm, steps, len(prompts))
    result = held(llm)
    finish(llm)
    return result


def held(llm: LLM) -> dict:
    """Blocks in use, and the bytes of the pools that they are of."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    return {
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # one is the null block
        "num_blocks": pool.num_gpu_blocks,
        "block_tokens": scheduler.block_size,
        "cache_bytes": llm.collective_rpc(live.cache_bytes)[0],
        **memory_of(llm),
    }


def memory_of(llm: LLM) -> dict:
    """Checks SPARDA's tables and returns the bytes of its pools; empty for other backends."""
    backend = llm.llm_engine.vllm_config.attention_config.backend
    if backend is None or backend.name != "SPARDA":
        return {}
    llm.collective_rpc(live.check_integrity)
    return llm.collective_rpc(live.sparda_memory)[0]


def begin_forced(llm: LLM, prompts: list[list[int]], max_tokens: int) -> dict:
    """Brings requests to decode, then takes over the selection."""
    begin(llm, prompts, max_tokens)
    llm.collective_rpc(live.force, args=(min(map(len, prompts)),))
    return llm.collective_rpc(live.shape)[0]


def forced(llm: LLM, rate: float, steps: int, batch: int) -> dict:
    """Decodes at a forced miss rate and returns the seconds of each step, and what was counted."""
    llm.collective_rpc(live.set_rate, args=(rate,))
    decode(llm, 0, batch, dropped=SETTLING_STEPS)
    before = llm.collective_rpc(live.counts)[0]
    seconds = decode(llm, steps, batch)
    after = llm.collective_rpc(live.counts)[0]
    return {"seconds": seconds, "counts": {key: after[key] - before[key] for key in after}}


def _add(
    llm: LLM, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0
) -> list[str]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    ids = []
    for prompt in prompts:
        request_id = str(next(llm.request_counter))
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        ids.append(request_id)
    return ids
