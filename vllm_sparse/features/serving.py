# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Rows of the table: ranks, decoding and serving."""

from __future__ import annotations

from vllm_sparse.features.verdicts import Refused, Served, Untested, everywhere, row

_CPU = "tests/backends/test_policy_cpu.py::"
_GPU = "tests/backends/test_policy_gpu.py::"
_SPARDA = "tests/backends/test_sparda.py::"
_SPARDA_GPU = Served("tests/backends/test_sparda_gpu.py::test_gpu_path_gives_the_cpu_path_s_tokens")
_SERVE = Served("tests/test_serve.py::test_concurrent_served_requests_equal_the_engine")
_DRAFTERS = "tests/backends/test_drafters_cpu.py::"
_STREAMS = Refused(
    "speculative decoding: rows of several tokens stream their whole context in every step; remove "
    "--speculative-config"
)
_NO_ROOM = Refused(
    "pipeline parallelism on a CPU: vLLM makes room for what a stage receives only where it "
    "compiles, and its engine would die of the first request, with this plugin or without; remove "
    "--enforce-eager, -O0 or --enable-lora, or use --tensor-parallel-size"
)
_DRAFTERS_TIER = Refused(
    "--speculative-config: whether keys and values of the drafter's layers return from host memory "
    "is untested; remove --kv-offloading-size"
)
# By hand: `make metrics-check`; tokens are compared by `make serve-matrix`.
_ENGINES = Served("tests/metrics/live_check.py::test_several_processes_count_what_one_does")
# Nothing of ours is part of it: experts have ranks of their own, attention has those of tensors.
_EXPERTS = Untested("stock vLLM 0.32, tried once on two ranks, ends with the first request")
_RANKS = "Parallelism"
_SERVING = "Decoding and serving"

ROWS = (
    row(
        _RANKS, "tensor-parallel", "tensor parallelism",
        (
            Served(_CPU + "test_tensor_parallelism_changes_nothing"),
            Served(_GPU + "test_tensor_parallelism"),
        ),
        (
            Served(_SPARDA + "test_nothing_changes_with"),
            Served("tests/backends/test_sparda_gpu.py::test_tensor_parallelism"),
        ),
    ),
    row(
        _RANKS, "ranks-than-heads", "more tensor-parallel ranks than KV heads",
        (Served("tests/backends/test_copied_heads.py::test_rocketkv"), Untested()),
        (Served("tests/backends/test_copied_heads.py::test_sparda"), Untested()),
    ),
    row(
        _RANKS, "pipeline", "pipeline parallelism",
        (Served("tests/backends/test_pipeline.py::test_rocketkv"), Untested()),
        (Served("tests/backends/test_pipeline.py::test_sparda"), Untested()),
    ),
    row(
        _RANKS, "pipeline-ahead", "the same with the selectors `forecast` and `lookahead-query`",
        None,
        Refused(
            "pipeline parallelism: selector {selector} looks at the input of the layer before, "
            "which another rank has where a stage begins; set vllm_sparse.selector to previous or "
            "query"
        ),
    ),
    row(
        _RANKS, "pipeline-eager",
        "the same without vLLM's compiler: `--enforce-eager`, `-O0`, or beside LoRA",
        (_NO_ROOM, None), (_NO_ROOM, None),
    ),
    row(
        _RANKS, "data-parallel", "data parallelism",
        (_ENGINES, Untested()), (_ENGINES, Untested()),
    ),
    row(
        _RANKS, "expert-parallel", "expert parallelism (`--enable-expert-parallel`)",
        (_EXPERTS, Untested()), (_EXPERTS, Untested()),
    ),
    everywhere(
        _RANKS, "context-parallel", "context parallelism",
        "context parallelism spreads one request's tokens over ranks; use tensor parallelism",
    ),
    everywhere(
        _RANKS, "half-steps", "dual batch overlap",
        "dual batch overlap builds the metadata of half a step; remove --enable-dbo",
    ),
    row(
        _SERVING, "server", "the OpenAI API, batches, several samples, aborts, metrics",
        (_SERVE, Untested()), (_SERVE, Untested()),
    ),
    row(
        _SERVING, "runner", "Model Runner V2, beside V1",
        (
            Served(_CPU + "test_model_runner_v2_changes_nothing"),
            Served(_GPU + "test_gpu_path_gives_the_cpu_path_s_tokens"),
        ),
        (Served(_SPARDA + "test_nothing_changes_with"), _SPARDA_GPU),
    ),
    row(
        _SERVING, "drafts", "drafts from tokens: methods `ngram`, `custom_class`",
        (
            Served(_CPU + "test_drafts_change_nothing"),
            Served("tests/backends/test_drafts_gpu.py::test_unlike_rows_and_rejections"),
        ),
        _STREAMS,
    ),
    row(
        _SERVING, "drafts-moved", "the same with `enable_adaptive_verification`",
        (
            None,
            Refused(
                "--speculative-config: enable_adaptive_verification moves drafts from request to "
                "request on the device, while steps are planned; set it to false"
            ),
        ),
        None,
    ),
    row(
        _SERVING, "suffix",
        "drafts from suffixes: method `suffix` (tested with a stand-in for its package)",
        (
            Served(_CPU + "test_drafts_from_the_context_change_nothing"),
            Served("tests/backends/test_drafts_gpu.py::test_suffixes"),
        ),
        None,
    ),
    row(
        _SERVING, "ngram-gpu", "the same on the device: method `ngram_gpu`",
        Untested(), None,
    ),
    row(
        _SERVING, "drafters", "drafters with layers: EAGLE, EAGLE-3, MTP (methods `eagle`, "
        "`eagle3`, `mtp`)",
        (
            Served(_DRAFTERS + "test_heads_that_know_the_model_are_accepted"),
            Served("tests/backends/test_drafters_gpu.py::test_heads_are_accepted_as_on_cpus"),
        ),
        _STREAMS,
    ),
    row(
        _SERVING, "draft-models", "draft models (method `draft_model`)",
        (
            Served(_DRAFTERS + "test_the_model_itself_as_drafter_is_accepted"),
            Refused(
                "--speculative-config: a draft model's rows come with lengths on the host that are "
                "one short, so they are served on CPUs only; use method eagle3, mtp or ngram"
            ),
        ),
        _STREAMS,
    ),
    row(
        _SERVING, "other-drafters", "other drafters: DFlash, DSpark, Medusa, `parallel_drafting`",
        Refused(
            "--speculative-config: method {method}{parallel} drafts several tokens in one pass "
            "that is not causal, or is unknown here; use method eagle, eagle3, mtp, draft_model, "
            "ngram, suffix or custom_class"
        ),
        _STREAMS,
    ),
    row(
        _SERVING, "unlike-drafters", "drafters whose KV heads serve another number of query heads",
        Refused(
            "--speculative-config: the drafter has {found} query heads per KV head, the model "
            "{expected}; they share the decision what a prompt keeps. Use a drafter of the same "
            "ratio, or method ngram"
        ),
        None,
    ),
    row(
        _SERVING, "drafters-modules", "MTP with several modules that draft one after the other",
        Refused(
            "--speculative-config: MTP modules that draft one after the other write tokens again "
            "that are before the present ones, when a prompt may have been compacted; set "
            "num_speculative_tokens to 1"
        ),
        None,
    ),
    row(
        _SERVING, "drafters-caches", "drafters with a `kv_cache_dtype` of their own",
        Refused(
            "--speculative-config: kv_cache_dtype {kind} beside the model's {expected}: they share "
            "blocks; remove it"
        ),
        None,
    ),
    row(
        _SERVING, "drafters-tier", "drafters with layers beside `--kv-offloading-size`",
        (
            Served(_DRAFTERS + "test_heads_are_accepted_behind_what_returns_from_a_tier"),
            _DRAFTERS_TIER,
        ),
        None,
        outside=_DRAFTERS_TIER,
    ),
    row(
        _SERVING, "drafters-stages", "drafters with layers beside pipeline parallelism",
        Refused(
            "--speculative-config: the drafter's layers are on the last stage of the pipeline, "
            "which is untested; remove --pipeline-parallel-size"
        ),
        None,
    ),
    row(
        _SERVING, "drafters-windows", "drafters with layers beside sliding windows",
        Refused(
            "--speculative-config: beside sliding windows vLLM puts every layer of the drafter "
            "into a block table of its own, which is untested; use method ngram"
        ),
        None,
    ),
    row(
        _SERVING, "drafts-states",
        "drafts from tokens beside recurrent state layers",
        (
            Refused(
                "drafts beside recurrent state layers: vLLM 0.32's CPU kernels give other tokens "
                "as soon as drafts are configured, with this plugin or without; remove "
                "--speculative-config"
            ),
            Served("tests/backends/test_states_gpu.py::test_drafts_and_prefix_hits"),
        ),
        None,
    ),
    row(
        _SERVING, "drafts-states-runner",
        "the same under Model Runner V1: `suffix` and `custom_class` always",
        (
            None,
            Refused(
                "drafts beside recurrent state layers under Model Runner V1 are untested; use "
                "method ngram, and leave out VLLM_USE_V2_MODEL_RUNNER=0"
            ),
        ),
        None,
    ),
    row(
        _SERVING, "drafters-states", "drafters with layers beside recurrent state layers",
        Refused(
            "--speculative-config: what a drafter's layers do beside recurrent states is untested; "
            "remove it"
        ),
        None,
    ),
    row(
        _SERVING, "lora", "LoRA",
        (
            Served(_CPU + "test_lora_equals_merged_weights"),
            Served(_GPU + "test_lora_equals_merged_weights"),
        ),
        (
            Served(_SPARDA + "test_lora_equals_merged_weights"),
            Served("tests/backends/test_sparda_gpu.py::test_lora_beside_requests_without_it"),
        ),
    ),
    row(
        _SERVING, "lora-ahead", "LoRA with the selectors `forecast` and `lookahead-query`",
        None,
        Refused(
            "LoRA replaces the projections that selector {selector} sits beside; set "
            "vllm_sparse.selector to previous or query, or remove --enable-lora"
        ),
    ),
    row(
        _SERVING, "transfer-ahead",
        "weight updates (`--weight-transfer-config`) with the selector `lookahead-query`",
        None,
        Refused(
            "selector lookahead-query takes the query projections when vLLM loads them, and would "
            "not see those that are written in place; set vllm_sparse.selector to previous or "
            "query, or remove --weight-transfer-config"
        ),
    ),
    row(
        _SERVING, "unprocessed-ahead",
        "`--load-format` `tensorizer` or `ipc_cache` with the selectors `forecast` and "
        "`lookahead-query`",
        None,
        Refused(
            "--load-format {kind} brings weights past where vLLM processes them and past the "
            "projections that selector {selector} sits beside; use --load-format auto, or set "
            "vllm_sparse.selector to previous or query"
        ),
    ),
    row(
        _SERVING, "sparse-prompts", "`sparse_prefill`",
        None, (Served(_SPARDA + "test_sparse_prompts_equal_hugging_face"), _SPARDA_GPU),
    ),
    row(
        _SERVING, "prompt-blocks", "`sparse_prefill` with another number of blocks than outputs",
        None,
        (
            Served(_SPARDA + "test_sparse_prompts_equal_hugging_face"),
            Refused(
                "vllm_sparse.sparse_prefill: {prompts} blocks for prompts and {outputs} for "
                "outputs are supported on CPUs only: on a GPU a captured graph may run a prompt's "
                "token among decode rows. Set sparse_prefill to true, or top_k to the same number"
            ),
        ),
    ),
    row(
        _SERVING, "prompt-selector", "`prompt_selector`: prompts choose otherwise than outputs",
        None,
        (
            Served(_SPARDA + "test_prompts_chosen_by_queries_equal_hugging_face"),
            Refused(
                "vllm_sparse.prompt_selector={selector} beside another selector is supported on "
                "CPUs only: on a GPU a captured graph may run a prompt's token among decode rows. "
                "Leave it out, or set selector to {selector}"
            ),
        ),
    ),
    row(
        _SERVING, "budgets", "`max_token_budget`: requests that bring a `token_budget`",
        (
            Served("tests/backends/test_controls.py::test_budgets_share_batches_and_prefixes"),
            Refused(
                "vllm_sparse.max_token_budget={budget}: on GPUs a captured graph reads one number "
                "of tokens; leave it out, or raise token_budget for all requests"
            ),
        ),
        None,
    ),
    row(
        _SERVING, "auxiliary", "`--aux-output-config`",
        Refused(
            "vLLM keeps auxiliary outputs of what its pool has room for, and of what the prefix "
            "cache has when a request ends: not of blocks that a policy has given back, or "
            "publishes then. Remove --aux-output-config"
        ),
        Untested(),
    ),
    everywhere(
        _SERVING, "other-schedulers",
        "`--scheduler-cls` of a class that does not extend vLLM's `Scheduler`",
        "--scheduler-cls {name} does not extend vLLM's Scheduler, where this plugin learns what a "
        "request asks for; extend that or AsyncScheduler, or remove the option",
    ),
    row(
        _SERVING, "sleep", "sleep mode",
        Untested(),
        Refused(
            "sleep mode frees device memory that it does not know of; remove --enable-sleep-mode"
        ),
    ),
    row(
        _SERVING, "flash-attention", "GPUs for which vLLM has no FlashAttention",
        (
            None,
            Refused(
                "prompts run through FlashAttention, which this installation of vLLM lacks for "
                "this device. On a CPU leave vllm_sparse.kernels at auto"
            ),
        ),
        None,
    ),
)  # fmt: skip
