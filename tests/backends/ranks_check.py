# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Two ranks on the GPU's path, on a CPU: ``python -m pytest -n 0 tests/backends/ranks_check.py``.

Each has half of the heads. Too slow for the suite, so pytest collects it only by name.
"""

from __future__ import annotations

import pytest
from support.engine import BLOCK_SIZE, SETTINGS, SPARDA_SETTINGS, run_engine
from support.masked import assert_tokens_of_hugging_face
from support.masked_sparda import assert_tokens_of_hugging_face as assert_tokens_of_sparda

NEW_TOKENS = 8
BACKENDS = {
    "rocketkv": (SETTINGS, ("captured_graphs",), {"block_size": BLOCK_SIZE}),
    "sparda": (SPARDA_SETTINGS, (), {"max_num_seqs": 6}),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_equal_hugging_face(llama, prompts, backend):
    settings, further, options = BACKENDS[backend]
    run = run_engine(
        llama, prompts[:2], settings={**settings, "kernels": "triton"}, backend=backend,
        stand_ins=("forked_workers", "no_compiler", "flash_attention", *further),
        env={"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        tensor_parallel_size=2, in_process=False, new_tokens=NEW_TOKENS,
        kv_cache_memory_bytes=6 << 20, timeout=900, **options,
    )  # fmt: skip
    judge = assert_tokens_of_sparda if backend == "sparda" else assert_tokens_of_hugging_face
    judge(llama, prompts[:2], run["tokens"][0])
