# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Room for what a stage of a pipeline receives, in workers that import this.

vLLM 0.32 makes it in a rehearsal, which CPUs leave out with ``enforce_eager``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_gather = GPUModelRunner.sync_and_gather_intermediate_tensors


def _gather_into_room(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
        )
    return _gather(self, *args, **kwargs)


GPUModelRunner.sync_and_gather_intermediate_tensors = _gather_into_room  # type: ignore[method-assign]


class Extension:
    """What vLLM imports for its workers."""
