# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Rows of the table: the KV cache."""

from __future__ import annotations

from vllm_sparse.features.verdicts import Refused, Served, Untested, everywhere, row

_CPU = "tests/backends/test_policy_cpu.py::"
_STATES = "tests/backends/test_states_cpu.py::"
_STATES_GPU = "tests/backends/test_states_gpu.py::"
_GPU = "tests/backends/test_policy_gpu.py::"
_SPARDA = "tests/backends/test_sparda.py::"
_SPARDA_GPU_POOL = Served("tests/backends/test_sparda_gpu.py::test_preempted_and_cached_requests")
_SPARDA_GPU = Served("tests/backends/test_sparda_gpu.py::test_gpu_path_gives_the_cpu_path_s_tokens")
_TIER = "tests/backends/test_prefix_tier.py::TestEngines::"
_CACHE = "KV cache"
_WHOLE_PROMPTS = (
    "KV connectors move whole prompts, but a compacted request has only its kept tokens; remove "
)
_POWER_OF_TWO = Refused(
    "blocks of {size} tokens: on GPUs a block must be a power of two. Set vllm_sparse.block_size "
    "to 16, 32, 64 or 128"
)

ROWS = (
    row(
        _CACHE, "prefix-caching", "prefix caching",
        (
            Served(_CPU + "test_prefix_caching_changes_nothing"),
            Served(_GPU + "test_preempted_and_cached_requests"),
        ),
        (Served(_SPARDA + "test_prefix_caching_changes_nothing"), _SPARDA_GPU_POOL),
    ),
    row(
        _CACHE, "events", "`--kv-events-config`: what routers follow",
        Served("tests/kv/test_copies.py::test_random_lives"),
        Served(
            "tests/backends/test_events.py::"
            "test_sparda_s_are_stock_s_where_outputs_are_shared_too"
        ),
    ),
    row(
        _CACHE, "chunks", "chunked prefill",
        (
            Served(_CPU + "test_chunked_prefill_and_mixed_steps_change_nothing"),
            Served(_GPU + "test_a_window_that_comes_token_by_token"),
        ),
        (Served(_SPARDA + "test_nothing_changes_with"), _SPARDA_GPU),
    ),
    row(
        _CACHE, "preemption", "preemption",
        (
            Served(_CPU + "test_preemption_changes_nothing"),
            Served(_GPU + "test_preempted_and_cached_requests"),
        ),
        (Served(_SPARDA + "test_preemption_changes_nothing"), _SPARDA_GPU_POOL),
    ),
    row(
        _CACHE, "fp8", "`--kv-cache-dtype fp8` (e4m3, a scale per layer)",
        (
            Served(
                "tests/backends/test_fp8_cpu.py::"
                "test_sparse_engine_equals_hugging_face_on_rounded_keys_and_values"
            ),
            Served(
                "tests/backends/test_fp8_gpu.py::"
                "test_tokens_are_those_of_hugging_face_on_rounded_numbers"
            ),
        ),
        (
            Served(
                "tests/backends/test_sparda_fp8.py::"
                "test_tokens_are_those_of_hugging_face_on_rounded_numbers"
            ),
            Served("tests/backends/test_sparda_fp8.py::test_the_gpu_path_rounds_to_the_nearest"),
        ),
    ),
    row(
        _CACHE, "fp8-narrow", "the same on a CPU without AVX-512",
        (
            Refused(
                "--kv-cache-dtype {kind} on this CPU: vLLM's own attention, which reads prompts "
                "and dense requests, wants AVX-512 for it; use auto"
            ),
            None,
        ),
        (
            Served(
                "tests/backends/test_sparda_fp8.py::"
                "test_tokens_are_those_of_hugging_face_on_rounded_numbers"
            ),
            None,
        ),
    ),
    everywhere(
        _CACHE, "e5m2", "`--kv-cache-dtype fp8_e5m2`",
        "--kv-cache-dtype {kind}: e5m2 has two binary digits, and FlashAttention does not read it; "
        "use fp8 or auto",
    ),
    everywhere(
        _CACHE, "scales-per-token", "caches with a scale per token and head",
        "--kv-cache-dtype {kind}: each token has a scale of its own, which compaction does not "
        "move; use fp8 or auto",
    ),
    everywhere(
        _CACHE, "other-fp8", "`--kv-cache-dtype fp8_inc` or `fp8_ds_mla`",
        "--kv-cache-dtype {kind}: laid out for other devices, or for MLA; use fp8 or auto",
    ),
    everywhere(
        _CACHE, "few-bits", "caches of fewer than 8 bits",
        "--kv-cache-dtype {kind}: numbers of fewer than 8 bits are packed in ways that compaction "
        "does not know; use fp8 or auto",
    ),
    row(
        _CACHE, "other-dtype", "`--kv-cache-dtype bfloat16` or `float16` that is not the model's",
        Refused(
            "--kv-cache-dtype {kind} beside a model in {model}: keys and values would be read as "
            "numbers of another kind than they were written; use auto"
        ),
        (
            Refused(
                "--kv-cache-dtype {kind} beside a model in {model}: on CPUs frames are read by "
                "queries of the same kind only; use auto"
            ),
            Untested(),
        ),
    ),
    everywhere(
        _CACHE, "several-dtypes", "`--kv-cache-dtype-skip-layers`",
        "a KV cache of {kind} in a layer beside {expected} in others (--kv-cache-dtype-skip-layers)"
        " has pages of another size",
    ),
    row(
        _CACHE, "tier", "`--kv-offloading-size`: evicted prefixes in host memory",
        (
            Served(_TIER + "test_evicted_prefixes_return_and_change_nothing"),
            Served(_TIER + "test_the_gpu_path"),
        ),
        Refused(_WHOLE_PROMPTS + "{option}"),
        outside=Refused(_WHOLE_PROMPTS + "{option}"),
    ),
    row(
        _CACHE, "tier-backend", "the same with `--kv-offloading-backend` other than `native`",
        Refused(_WHOLE_PROMPTS + "--kv-offloading-backend"),
        None,
    ),
    row(
        _CACHE, "tier-alone", "the same with `--no-enable-prefix-caching`",
        Refused(
            "{option} keeps cached prefixes; remove it, or --no-enable-prefix-caching"
        ),
        None,
    ),
    row(
        _CACHE, "tier-states", "the same beside recurrent state layers",
        Refused(
            "states of recurrent layers are stored apart from blocks, where vLLM keeps one, which "
            "this tier does not do yet; remove {option}"
        ),
        None,
    ),
    row(
        _CACHE, "tier-stages", "the same with pipeline parallelism",
        Refused("stages of a pipeline have blocks of different sizes; remove {option}"),
        None,
    ),
    everywhere(
        _CACHE, "connectors", "KV connectors, prefill and decode apart",
        _WHOLE_PROMPTS + "--kv-transfer-config",
    ),
    row(
        _CACHE, "one-manager",
        "`--disable-hybrid-kv-cache-manager` beside sliding-window or recurrent state layers",
        Refused(
            "--disable-hybrid-kv-cache-manager gives sliding-window or recurrent state layers and "
            "ours one block table, whose blocks would leave for both, or for none; remove it"
        ),
        None,
    ),
    row(
        _CACHE, "hits-within-blocks",
        "`--prefix-match-unit` beside sliding-window or recurrent state layers",
        Refused(
            "--prefix-match-unit: of a block in which a hit ends, vLLM copies what the first of "
            "the layers that share it takes, which may be less than ours; remove it"
        ),
        None,
    ),
    row(
        _CACHE, "packing", "pages packed by vLLM in another way than is known (bfloat16 on ARM)",
        (
            Refused(
                "the stock attention kernel packs KV pages of {size} x {dim} {dtype} in a way that "
                "vllm-sparse does not know, so prompts cannot be compacted (on ARM in bfloat16, "
                "for one). Use another --dtype, or SPARDA, whose pages are its own; and please "
                "report the CPU model and the vLLM version"
            ),
            None,
        ),
        None,
    ),
    row(
        _CACHE, "odd-blocks", "blocks that are no power of two",
        (
            Served(_STATES + "test_recurrent_states_equal_hugging_face"),
            Served(_STATES_GPU + "test_blocks_taken_in_parts_equal_hugging_face"),
        ),
        (Untested(), _POWER_OF_TWO),
    ),
    row(
        _CACHE, "narrow-parts", "the same with too little room for a window's queries in a part",
        (
            None,
            Refused(
                "on GPUs blocks of {size} tokens are taken in parts of {part}, where {places} of "
                "the {window} queries of a prompt's window can wait for its end; lower "
                "vllm_sparse.window"
            ),
        ),
        None,
    ),
    row(
        _CACHE, "other-blocks", "a block size that vLLM changes, to give all layers one page size",
        Refused(
            "vLLM changed the block size from {wanted} to {size} to give all layers of this model "
            "pages of one size. Choose a --block-size that it keeps, for example {size}"
        ),
        Refused("vLLM chose blocks of {size} tokens, but vllm_sparse.block_size is {wanted}"),
    ),
    row(
        _CACHE, "page-sizes", "several `page_sizes` at once",
        (
            Served(_CPU + "test_ablations_equal_hugging_face"),
            Refused(
                "page_sizes={sizes}: on GPUs one page size serves all requests, because a captured "
                "graph has one shape. Choose one of them"
            ),
        ),
        None,
    ),
)  # fmt: skip
