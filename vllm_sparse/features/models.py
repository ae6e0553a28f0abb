# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Rows of the table: models: what their layers are."""

from __future__ import annotations

from vllm_sparse.features.verdicts import Refused, Served, Stock, Untested, everywhere, row

_CPU = "tests/backends/test_policy_cpu.py::"
_SINKS = "tests/backends/test_sinks_cpu.py::"
_STATES = "tests/backends/test_states_cpu.py::"
_STATES_GPU = "tests/backends/test_states_gpu.py::"
_GPU = "tests/backends/test_policy_gpu.py::"
_SPARDA = "tests/backends/test_sparda.py::"
_SPARDA_GPU = Served("tests/backends/test_sparda_gpu.py::test_gpu_path_gives_the_cpu_path_s_tokens")
_PARTS = "tests/backends/test_parts.py::test_what_is_asked_in_text_is_answered_as_by_the_text_model"
_MODELS = "Models"
_BOTH_WAYS = (
    Untested("read one way, as by stock vLLM on CPUs"),
    Refused(
        "tokens of one image attend each other both ways; prompts here do not. Leave out "
        "--attention-backend, or allow no images with --limit-mm-per-prompt"
    ),
)

ROWS = (
    row(
        _MODELS, "attention",
        "multi-head and grouped-query attention (Llama, Qwen, Mistral, MiniCPM, Granite)",
        (
            Served(_CPU + "test_sparse_engine_equals_hugging_face_with_the_mask"),
            Served(_GPU + "test_gpu_path_gives_the_cpu_path_s_tokens"),
        ),
        (Served(_SPARDA + "test_lookahead_query_equals_hugging_face"), _SPARDA_GPU),
    ),
    row(
        _MODELS, "experts", "mixtures of experts (Qwen3-MoE)",
        (Served(_CPU + "test_experts_equal_hugging_face"), Served(_GPU + "test_experts")),
        (
            Served(_SPARDA + "test_other_architectures_equal_hugging_face"),
            Served("tests/backends/test_sparda_gpu.py::test_experts"),
        ),
    ),
    row(
        _MODELS, "parts", "models that read images or audio, asked in text (Qwen2-Audio)",
        (Served(_PARTS), Untested()), (Served(_PARTS), Untested()),
    ),
    row(_MODELS, "media", "the same with images or audio", Untested(), Untested()),
    row(
        _MODELS, "windows", "sliding-window layers beside full attention",
        (
            Stock(_CPU + "test_sliding_window_layers_stay_stock"),
            Stock(_GPU + "test_sliding_window_layers_stay_stock"),
        ),
        Refused(
            "this model has sliding-window layers, but {backend} looks from each layer to the next "
            "and needs them all alike. Use --attention-backend ROCKETKV"
        ),
    ),
    row(
        _MODELS, "windows-only", "nothing but sliding-window layers",
        Refused(
            "every layer has a sliding window of {window} tokens and would be served by stock "
            "attention; use --disable-sliding-window, with --max-model-len at most that long"
        ),
        None,
    ),
    everywhere(
        _MODELS, "reference-windows",
        "outputs that attend to prompts and a window of outputs (Unlimited-OCR)",
        "outputs attend to the prompt and to the last {window} outputs only, and vLLM frees the "
        "blocks between, which ours count on; leave out --attention-backend",
    ),
    everywhere(
        _MODELS, "attention-free", "models without attention (Mamba)",
        "this model has no attention layers that {backend} could serve; leave out "
        "--attention-backend",
    ),
    everywhere(
        _MODELS, "chunked-layers", "attention within chunks of the context (Llama 4)",
        "layers that attend within chunks of {size} tokens share a KV cache group with full "
        "attention, whose blocks would leave with ours; leave out --attention-backend",
    ),
    row(
        _MODELS, "image-prefixes", "image tokens that attend both ways (Gemma 3)",
        _BOTH_WAYS, _BOTH_WAYS,
    ),
    everywhere(
        _MODELS, "own-backends", "models that bring an attention backend (MiMo-V2, openPangu)",
        "this model attends with {other} whatever is chosen, so that {backend} would serve "
        "{served} of its layers; leave out --attention-backend",
    ),
    everywhere(
        _MODELS, "per-kind", "`--attention-config.backend_per_kind` for full attention",
        "--attention-config.backend_per_kind gives layers of kind {kind} to {other}, but one "
        "backend serves all full attention, and --attention-backend names it; remove that entry",
    ),
    row(
        _MODELS, "flash-attention-4", "sliding-window layers that run on FlashAttention 4",
        (
            None,
            # It takes what makes the runner hand over prompt lengths for another kind of window.
            Refused(
                "sliding-window layers stay stock beside ours, which FlashAttention 4 does not "
                "allow. Choose an older one with --attention-config.flash_attn_version"
            ),
        ),
        None,
    ),
    row(
        _MODELS, "triton-windows", "sliding-window layers that run on `TRITON_ATTN`",
        (
            None,
            # The same; it would read whole prompts, blocks included that were given back.
            Refused(
                "sliding-window layers stay stock beside ours, which TRITON_ATTN does not allow. "
                "Choose FLASH_ATTN with --attention-config.backend_per_kind.sliding_window, or "
                "leave out --attention-backend"
            ),
        ),
        None,
    ),
    everywhere(
        _MODELS, "hidden-windows",
        "layers that hide their window from the choice of a backend (Voxtral Realtime)",
        "layers with a window of {window} tokens that does not show when their backend is chosen",
    ),
    row(
        _MODELS, "layers-twice", "layers that run twice in a step (IQuestLoopCoder)",
        Refused(
            "{architecture} reads each layer's keys and values once more in the same step, when "
            "they may have been compacted; leave out --attention-backend"
        ),
        None,
    ),
    row(
        _MODELS, "states", "recurrent state layers (Granite H, Qwen3-Next)",
        (
            Served(_STATES + "test_recurrent_states_equal_hugging_face"),
            Served(_STATES_GPU + "test_blocks_taken_in_parts_equal_hugging_face"),
        ),
        Refused(
            "models with recurrent state layers pad each block to a state, which takes more device "
            "memory than stock attention; use ROCKETKV"
        ),
    ),
    row(
        _MODELS, "states-runner", "the same under Model Runner V2",
        (
            Served(_STATES + "test_model_runner_v2_changes_nothing"),
            Served(_STATES_GPU + "test_blocks_taken_in_parts_equal_hugging_face"),
        ),
        None,
    ),
    row(
        _MODELS, "states-cached", "the same with Mamba-2 layers and prefix caching (Granite H)",
        (
            Refused(
                "prefix caching beside Mamba-2 layers on a CPU: vLLM 0.32 keeps states where its "
                "CPU kernels return none, and its engine would die of the first request, with this "
                "plugin or without; use --no-enable-prefix-caching"
            ),
            None,
        ),
        None,
    ),
    row(
        _MODELS, "unlike-layers", "full-attention layers of several shapes in one model",
        Refused(
            "layers with {found} and {expected} query heads per KV head share a cache layout; "
            "{backend} needs one ratio for the whole model. Leave out --attention-backend"
        ),
        Refused(
            "{found} of {expected} layers have one kind of attention and one size of KV heads; "
            "{backend} looks from each layer to the next and needs them all alike. Use "
            "--attention-backend ROCKETKV"
        ),
    ),
    everywhere(
        _MODELS, "mla", "multi-head latent attention (DeepSeek)",
        "MLA models have one latent vector per token and no KV heads; use a GQA model",
    ),
    everywhere(
        _MODELS, "pooling", "embedding, classification and other models that do not decode",
        "{runner} models do not decode; leave out --attention-backend",
    ),
    everywhere(
        _MODELS, "alibi", "ALiBi",
        "ALiBi adds a bias by position, which kept tokens no longer have",
    ),
    row(
        _MODELS, "sinks", "learned attention sinks (gpt-oss)",
        (
            Served(_SINKS + "test_tokens_are_those_of_hugging_face_under_the_mask"),
            Served("tests/backends/test_sinks_gpu.py::test_gpu_path_gives_the_cpu_path_s_tokens"),
        ),
        Refused(
            "learned attention sinks take part in every softmax, and {backend} leaves them out "
            "where it chooses and reads blocks. Use --attention-backend ROCKETKV"
        ),
    ),
    row(
        _MODELS, "sinks-flash-attention", "the same where FlashAttention 2 would read prompts",
        (
            None,
            Refused(
                "learned attention sinks: prompts are read by FlashAttention, which knows of them "
                "from version 3 on, on GPUs of compute capability 9.0 or later, and here it is "
                "version {version}. Leave out --attention-backend, and "
                "--attention-config.flash_attn_version if it is given"
            ),
        ),
        None,
    ),
    everywhere(
        _MODELS, "soft-cap", "capped logits (Gemma 2)",
        "capped logits are not implemented by the decode kernels",
    ),
    everywhere(
        _MODELS, "encoder", "encoder and cross attention",
        "{kind} attention has no KV cache that grows by decoding",
    ),
    everywhere(
        _MODELS, "shared-caches", "layers that share one KV cache (Gemma 3n)",
        "layers that share one KV cache keep different tokens",
    ),
    everywhere(
        _MODELS, "non-causal", "non-causal attention (DiffusionGemma)",
        "non-causal attention needs the whole context at every step; leave out --attention-backend",
    ),
    row(
        _MODELS, "unknown-projections",
        "selectors `forecast` and `lookahead-query` with other architectures than are known",
        None,
        Refused(
            "selector {selector} needs the input of each layer's query projection, and "
            "{architecture} is not among the architectures where that is known: {known}. Set "
            "vllm_sparse.selector to query or previous"
        ),
    ),
    row(
        _MODELS, "untapped", "the same with layers that have no projection to sit beside",
        None,
        Refused(
            "selector {selector} needs a projection with weights beside qkv_proj, which these "
            "layers lack: {layers}. Choose --load-format auto, or selector query or previous"
        ),
    ),
)  # fmt: skip
