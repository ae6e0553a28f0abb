# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Teacher forcing through the decode path: a logits processor that records and then forces.

Prompt log-probabilities would come from prefill, which is dense in every arm. So the engine
generates, one decode step per token; before each token is sampled, the processor writes the model's
log-probabilities to a file, if there is one, and leaves only the next token of the given text to
sample, unless that is left to the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from benchmarks.commands import FREE

if TYPE_CHECKING:
    from pathlib import Path

MEANS = ("kl", "top1_agreement", "nll_dense", "nll")  # of what `compare` returns


class ForcedTokens(AdapterLogitsProcessor):
    """Serves requests whose `extra_args` have ``forced_tokens``, and maybe ``record_to``."""

    def is_argmax_invariant(self) -> bool:
        """It decides the token."""
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        """Returns the state of one request, or None if it is not to be forced."""
        arguments = params.extra_args or {}
        if "forced_tokens" not in arguments:
            return None
        return _Request(arguments["forced_tokens"], arguments.get("record_to"))


class _Request:
    def __init__(self, forced_tokens: list[int], record_to: str | None) -> None:
        self._forced = forced_tokens
        self._record_to = record_to
        self._rows: np.ndarray | None = None

    def __call__(self, output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Records the row of the next token, then masks all tokens but the forced one."""
        step = len(output_token_ids)
        if self._record_to is not None:
            self._record(step, logits)
        if self._forced[step] == FREE:
            return logits
        forced = torch.full_like(logits, float("-inf"))
        forced[self._forced[step]] = 0.0
        return forced

    def _record(self, step: int, logits: torch.Tensor) -> None:
        if self._rows is None:
            shape = (len(self._forced), logits.shape[-1])
            self._rows = np.lib.format.open_memmap(
                self._record_to, mode="w+", dtype=np.float32, shape=shape
            )
        # Chunks of the prompt also pass here, at step 0; the last one is the one that counts.
        self._rows[step] = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        if step == len(self._forced) - 1:
            self._rows.flush()


def sampling_params(forced_tokens: list[int], record_to: str | None = None) -> SamplingParams:
    """Returns the parameters of a request that is forced through `forced_tokens`.

    Args:
        forced_tokens: The text's tokens after the prompt; `FREE` where the model chooses.
        record_to: A ``.npy`` file for the log-probabilities, float32 [forced tokens, vocabulary]:
            2.4 GB for 4,000 tokens of a vocabulary of 152,000. Row i is the distribution from which
            token i would have been sampled.
    """
    record = {} if record_to is None else {"record_to": record_to}
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(forced_tokens),
        ignore_eos=True,
        extra_args={"forced_tokens": list(forced_tokens), **record},
    )


def compare(reference: Path, other: Path, forced_tokens: list[int], first: int = 1) -> dict:
    """Compares two recordings of the same text.

    Args:
        reference: The recording of the dense model.
        other: The recording of the model to judge.
        forced_tokens: The text.
        first: First row to compare; row 0 comes from prefill.

    Returns:
        Means over the rows: ``kl`` from the reference to the other in nats, ``top1_agreement``, and
        both models' negative log-likelihoods of the text; ``kl_by_quarter`` of the text.
    """
    p_rows, q_rows = np.load(reference, mmap_mode="r"), np.load(other, mmap_mode="r")
    kl, agreement, nll_p, nll_q = [], [], [], []
    for row in range(first, len(forced_tokens)):
        p, q = (torch.from_numpy(np.array(rows[row])).double() for rows in (p_rows, q_rows))
        finite = p > float("-inf")
        kl.append((p.exp() * (p - q))[finite].sum().item())
        agreement.append((p.argmax() == q.argmax()).item())
        nll_p.append(-p[forced_tokens[row]].item())
        nll_q.append(-q[forced_tokens[row]].item())
    quarters = [float(np.mean(part)) for part in np.array_split(kl, 4) if len(part)]
    return {
        "kl": float(np.mean(kl)), "top1_agreement": float(np.mean(agreement)),
        "nll_dense": float(np.mean(nll_p)), "nll": float(np.mean(nll_q)), "tokens": len(kl),
        "kl_by_quarter": quarters,
    }  # fmt: skip
