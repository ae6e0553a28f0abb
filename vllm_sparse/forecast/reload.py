# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""New weights of a served model that taps which follow its queries would not see."""

from __future__ import annotations

from typing import Any

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.seams import replace_once


def watch_reloads(use_v2: bool) -> None:
    """Have model runners refuse new weights in the format of kernels, where taps follow queries.

    They are written over what is there, packed or not, and nothing is processed again.

    Args:
        use_v2: Model Runner V2 is in use.
    """
    if use_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        replace_once(GPUModelRunner, "reload_weights", _refusing)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

        replace_once(RunnerV1, "reload_weights", _refusing)


def _refusing(stock: Any) -> Any:
    def reload_weights(
        self: Any,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
        **others: Any,
    ) -> Any:
        taps = getattr(self.get_model(), "forecast_taps", None)
        if not is_checkpoint_format and taps is not None and taps.follow_queries:
            raise UnsupportedError(
                "reload_weights(is_checkpoint_format=False): selector lookahead-query takes the "
                "query projections when they are loaded, and would go on with the old ones. Give "
                "the weights in the format of a checkpoint, or set vllm_sparse.selector to "
                "previous or query"
            )
        return stock(self, weights_iterator, weights_path, is_checkpoint_format, **others)

    return reload_weights
