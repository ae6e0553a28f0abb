# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The rows: what is served beside what, and on what its tokens are judged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.served.asks import ALL
from benchmarks.soak import serving

if TYPE_CHECKING:
    from benchmarks.served.checkpoints import Checkpoints

LONGEST, BLOCKS = 1024, 200
MASK = {
    "token_budget": 64, "min_context": 128, "generation_reserve": 100, "page_sizes": [4],
    "window": 32,
}  # fmt: skip
EVERYTHING = {"token_budget": 4096, "max_token_budget": 4096, "stage1": False}
HITS = "vllm:prefix_cache_hits_total"
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
RETURNED = "vllm:external_prefix_cache_hits_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"


class Row(NamedTuple):
    """One pair of servers.

    Attributes:
        name: Of the row.
        backend: Ours.
        judge: A function of :mod:`.judges`: what tokens of sparse requests must be.
        options: Of both servers; paths of checkpoints stand in braces.
        own: Options of ours alone, which stock vLLM has not on CPUs.
        settings: Further ones of ours.
        model: A checkpoint.
        grows: Metrics that have to, beside the sparse ones.
        exact: Every sparse row of the requests is counted once, and no other.
        features: Also ask for what else the API offers.
        blocks: Of both pools.
        block_tokens: Of a block; empty: as vLLM chooses.
        refused: Part of the reason with which ours must not start.
        environment: Of both servers.
    """

    name: str
    backend: str = "ROCKETKV"
    judge: str = "rocketkv"
    options: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    settings: dict[str, Any] = {}  # noqa: RUF012
    model: str = "llama"
    grows: tuple[str, ...] = (HITS,)
    exact: bool = True
    features: bool = False
    blocks: int = BLOCKS
    block_tokens: str = str(serving.BLOCK_TOKENS)
    refused: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012

    @property
    def own_budgets(self) -> bool:
        """Whether requests may bring a budget."""
        return self.backend != "SPARDA"

    def subject(self) -> serving.Subject:
        """What ours serves; stock is the same without a backend."""
        settings = _settings(self.backend) | self.settings
        found = serving.subject(self.backend, LONGEST, **settings)
        return found._replace(blocks=self.blocks, block_tokens=self.block_tokens)

    def arguments(self, checkpoints: Checkpoints, ours: bool) -> list[str]:
        """Options with the paths of checkpoints."""
        names = ("llama", "adapter", "known", "eagle", "eagle3")
        wanted = [name for name in names if f"{{{name}}}" in " ".join(self.options)]
        # A head is written with the model that it knows.
        paths = {f"{{{name}}}": str(checkpoints.path(name)) for name in wanted}
        found = [*self.options, *(self.own if ours else ())]
        for name, path in paths.items():
            found = [option.replace(name, path) for option in found]
        return found


def _settings(backend: str) -> dict[str, Any]:
    """Settings that Hugging Face's side of the comparison has, too."""
    if backend == "SPARDA":
        return {"slab_gib": 0.0022}  # not a frame more than start-up asks for
    if backend == "ROCKETKV":
        return {**MASK, "max_token_budget": ALL}
    from support.policy_cases import CASES

    (case,) = (case for case in CASES if case.name == backend)
    return {**case.settings, "max_token_budget": ALL}


def _drafts(**of: Any) -> tuple[str, ...]:
    return "--speculative-config", json.dumps(of)


_LORA = (
    "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2",
    "--lora-modules", "adapter={adapter}",
)  # fmt: skip
_TP = ("--tensor-parallel-size", "2")
# In its rehearsal, without which a stage has no room for what it receives, vLLM compiles on CPUs.
_REHEARSED = {"VLLM_CPU_CI_ENV": "0"}
_STAGED = (
    "--pipeline-parallel-size", "2", "--no-enforce-eager", "-cc.mode=2", "-cc.backend=eager",
)  # fmt: skip
_DP = ("--data-parallel-size", "2", "--api-server-count", "1")
_STAGES = {**_REHEARSED, "VLLM_PP_LAYER_PARTITION": "1,2"}
_TIER = ("--kv-offloading-size", "0.05")
_EVENTS = ("--kv-events-config", '{"enable_kv_cache_events": true, "publisher": "zmq"}')
_FP8 = ("--kv-cache-dtype", "fp8")
_PLAIN_SELECTOR = {"selector": "query"}
_POLICIES = ("QUEST", "SNAPKV", "STREAMINGLLM")
_STATES = Row(
    "recurrent states", model="states", options=("--no-enable-prefix-caching",), grows=(),
    block_tokens="",
)  # fmt: skip

ROWS = [
    Row("ROCKETKV", features=True),
    Row("SPARDA", "SPARDA", "sparda", features=True),
    *(Row(name, name, "policy") for name in _POLICIES),
    Row("everything read", judge="stock", settings=EVERYTHING),
    Row("ngram drafts", options=_drafts(**_NGRAM), grows=(HITS, DRAFTED), exact=False),
    Row("EAGLE", model="known", grows=(HITS, DRAFTED, ACCEPTED), exact=False,
        options=_drafts(method="eagle", model="{eagle}", num_speculative_tokens=3)),
    Row("EAGLE-3", grows=(HITS, DRAFTED), exact=False,
        options=_drafts(method="eagle3", model="{eagle3}", num_speculative_tokens=3)),
    Row("draft model", grows=(HITS, DRAFTED, ACCEPTED), exact=False,
        options=_drafts(method="draft_model", model="{llama}", num_speculative_tokens=3)),
    Row("MTP", model="mimo", grows=(HITS, DRAFTED), exact=False,
        options=_drafts(method="mtp", num_speculative_tokens=1)),
    Row("fp8", judge="rocketkv_fp8", options=_FP8, settings={"window": 8}),
    Row("fp8, SPARDA", "SPARDA", "sparda_fp8", options=_FP8),
    Row("LoRA", options=_LORA),
    Row("LoRA, SPARDA", "SPARDA", "sparda", options=_LORA, settings=_PLAIN_SELECTOR),
    Row("host tier", own=_TIER, blocks=48, exact=False, grows=(HITS, RETURNED)),
    *(
        row._replace(name=f"fp8, {row.name}", judge="rocketkv_fp8", settings={"window": 8},
            options=(*_FP8, *row.options))
        for row in (_STATES._replace(model="small states"), Row("tensor parallel", options=_TP),
            Row("pipeline", options=_STAGED, environment=_STAGES))
    ),
    # Keys that rounding moves over a step of fp8 change tokens of these two: Hugging Face's, too,
    # if its keys are moved by 5e-7 of them before they are cut off.
    Row("fp8, learned sinks", model="sinks", judge="itself", options=_FP8, settings={"window": 8}),
    Row("fp8, tensor parallel, SPARDA", "SPARDA", "itself", options=(*_FP8, *_TP)),
    Row("fp8, ngram drafts, LoRA and host tier", judge="rocketkv_fp8", settings={"window": 8},
        options=(*_FP8, *_drafts(**_NGRAM), *_LORA), own=_TIER, blocks=48, exact=False,
        grows=(HITS, DRAFTED, RETURNED)),
    # In chunks of which each skips some of the blocks before it.
    Row("sparse prompts, SPARDA", "SPARDA", "sparda", settings={"sparse_prefill": True},
        options=("--max-num-batched-tokens", "32")),
    Row("KV events", options=_EVENTS),
    Row("KV events, SPARDA", "SPARDA", "sparda", options=_EVENTS),
    _STATES,
    # vLLM's own kernels of delta nets take nothing but bfloat16.
    Row("delta nets", model="delta nets", judge="itself", options=("--dtype", "bfloat16"),
        block_tokens=""),
    Row("sliding windows", model="windows", judge="itself"),
    Row("sliding windows, everything read", model="windows", judge="stock", settings=EVERYTHING),
    Row("experts", model="experts"),
    Row("learned sinks", model="sinks"),
    Row("tensor parallel", options=_TP),
    Row("tensor parallel, SPARDA", "SPARDA", "sparda", options=_TP),
    Row("pipeline", options=_STAGED, environment=_STAGES),
    Row("pipeline, SPARDA", "SPARDA", "sparda", options=_STAGED,
        environment=_STAGES, settings=_PLAIN_SELECTOR),
    Row("data parallel", options=_DP, grows=()),
    Row("data parallel, SPARDA", "SPARDA", "sparda", options=_DP, grows=()),
    Row("compiled", options=("--no-enforce-eager",), environment=_REHEARSED),
    Row("compiled, SPARDA", "SPARDA", "sparda", options=("--no-enforce-eager",),
        environment=_REHEARSED),
    Row("pooling", options=("--runner", "pooling", "--convert", "embed"),
        refused="do not decode"),
    *(
        row._replace(name=f"{row.name}, {policy}", backend=policy, judge=judge)
        for row, judge in (
            (Row("LoRA", options=_LORA), "policy"),
            (Row("experts", model="experts"), "policy"),
            (Row("tensor parallel", options=_TP), "policy"),
            (Row("pipeline", options=_STAGED, environment=_STAGES), "policy"),
            (Row("sliding windows", model="windows"), "itself"),
            (_STATES, "itself"),
        )
        for policy in _POLICIES
    ),
]  # fmt: skip
