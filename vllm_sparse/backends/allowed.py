# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What single requests may ask of a server, and who refuses the others where they come in."""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm.exceptions import VLLMClientError

from vllm_sparse.backends.refusals import takes_gpu_path
from vllm_sparse.config import load_settings
from vllm_sparse.control import Allowed
from vllm_sparse.errors import RequestError
from vllm_sparse.policies.controlled import with_budget
from vllm_sparse.policies.protocol import PolicySettings
from vllm_sparse.registry import is_ours
from vllm_sparse.seams import replace_once


class RefusedRequest(RequestError, VLLMClientError):
    """As vLLM's API answers with status 400, and ``LLM`` raises as a ``ValueError``."""


def watch_inputs() -> None:
    """Have requests refused in the processes that take them, before an engine knows of them.

    Those that an engine gets from elsewhere it refuses itself, see
    :func:`vllm_sparse.kv.requests.watch_engines`.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def make(stock: Any) -> Any:
        def process_inputs(
            self: Any, request_id: str, prompt: Any, params: Any, *arguments: Any, **named: Any
        ) -> Any:
            if not hasattr(self, "_vllm_sparse"):
                self._vllm_sparse = allowed_requests(self.vllm_config)
            if self._vllm_sparse is not None:
                try:
                    asked = getattr(params, "extra_args", None)
                    self._vllm_sparse.check(asked, named.get("resumable", False))
                except RequestError as error:
                    raise RefusedRequest(str(error)) from None
            return stock(self, request_id, prompt, params, *arguments, **named)

        return process_inputs

    replace_once(InputProcessor, "process_inputs", make)


def allowed_requests(vllm_config: Any) -> Allowed | None:
    """What single requests may ask for; ``None`` if none of our backends is chosen.

    Args:
        vllm_config: vLLM's complete configuration, which start-up has accepted.
    """
    backend = vllm_config.attention_config.backend
    if not is_ours(backend):
        return None
    settings = load_settings(vllm_config.additional_config, backend.name.lower())
    on_gpu = takes_gpu_path(settings)
    never_dense = never_budget = ""
    if not settings.allow_dense:
        never_dense = "this server has vllm_sparse.allow_dense: false; leave it out"
    if not isinstance(settings, PolicySettings):
        if on_gpu and settings.sparse_prefill:
            never_dense = (
                "a captured graph of sparse prompts has frames for the chosen blocks only; start "
                "the server without vllm_sparse.sparse_prefill"
            )
        return Allowed(never_dense, f"{backend.name} has frames for top_k blocks; leave it out")
    if on_gpu:
        never_budget = "on GPUs a captured graph reads one number of tokens; leave it out"
    largest, attempt = settings.most_tokens, partial(with_budget, settings)
    return Allowed(never_dense, never_budget, largest, attempt)
