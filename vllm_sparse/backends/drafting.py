# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans the passes of a drafter with layers, whose keys and values lie in our blocks.

A step of vLLM computes the model's rows, then the drafter's: first the same tokens (a draft model
also one more of each row), then one token of every row for each further draft. Of these passes
vLLM tells lengths and blocks, but not whose prompts they are: the model's own pass has noted it.

The drafter's layers are compacted with the model's, before the step behind a prompt's end. Until
then, what a pass brings beyond the request's own tokens is attended densely, in blocks as the stock
kernel writes them; nobody needs these drafts but those of the step that ends the prompt, and the
next step writes them again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_sparse.backends.policy import count_nothing
from vllm_sparse.control import AS_SET, DENSE
from vllm_sparse.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.steps.split import StepMetadata, StepPlanner


class Requests(NamedTuple):
    """The requests of a step, on the host.

    Attributes:
        prompt_lens: Prompt tokens, ``[R]``.
        controls: What they ask for, ``[R]``; ``None`` if nothing.
        ends: Tokens after the model's pass, ``[R]``; drafts that it rejected are still counted.
    """

    prompt_lens: Tensor
    controls: Tensor | None
    ends: Tensor


class Pass(NamedTuple):
    """The requests of a drafter's pass, on the host.

    Attributes:
        prompt_lens: Prompt tokens, ``[R]``.
        controls: What they ask for, or what holds for them until they are compacted, ``[R]``.
        parking: Rows with tokens of their prompt and one beyond, bool ``[R]``; ``None`` if there
            are none.
    """

    prompt_lens: Tensor
    controls: Tensor | None
    parking: Tensor | None


# Of the last pass of the model that a runner of this process has planned. The passes of its drafter
# follow within the same step of its engine, before another engine of the process takes one: engines
# that share a process share its thread, and others have processes of their own.
_rows: Requests | None = None


def note_rows(lengths: Tensor, prompt_lens: Tensor, controls: Tensor | None) -> None:
    """Remember the requests of a step for the drafter's passes, which change what they are given.

    Args:
        lengths: Tokens after the step, on the host, ``[R]``.
        prompt_lens: Prompt tokens, ``[R]``.
        controls: What requests ask for, ``[R]``; ``None`` if nothing.
    """
    global _rows
    asked = None if controls is None else controls.clone()
    _rows = Requests(prompt_lens.clone(), asked, lengths.clone())


def rows_of_pass(policy: Policy, common: CommonAttentionMetadata, lengths: Tensor) -> Pass:
    """The requests of a drafter's pass.

    Args:
        policy: Of its layers.
        common: The pass.
        lengths: Tokens of each row after it, on the host, ``[R]``.

    Raises:
        IntegrityError: The model's pass had fewer.
    """
    count = common.num_reqs
    if _rows is None or bool((lengths[len(_rows.ends) :] > 0).any()):
        raise IntegrityError(
            "vLLM drafts for requests that its model has not computed in this step, so that it is "
            "unknown which blocks hold what. Remove --speculative-config"
        )
    prompt_lens, ends = _first(_rows.prompt_lens, count), _first(_rows.ends, count)
    controls = None if _rows.controls is None else _first(_rows.controls, count)
    beyond = (lengths > ends) & (ends <= prompt_lens)
    if not policy.moves or not bool(beyond.any()):
        return Pass(prompt_lens, controls, None)
    if controls is None:
        controls = torch.full_like(prompt_lens, AS_SET)
    parking = beyond & (lengths - common.query_start_loc_cpu[: count + 1].diff() < ends)
    controls = torch.where(beyond, DENSE, controls)
    return Pass(prompt_lens, controls, parking if bool(parking.any()) else None)


def _first(rows: Tensor, count: int) -> Tensor:
    """So many rows; zeros for those that pad a graph's batch."""
    return torch.nn.functional.pad(rows, (0, max(count - len(rows), 0)))[:count]


def with_waiting_queries(
    step: StepMetadata,
    planner: StepPlanner,
    common: CommonAttentionMetadata,
    lengths: Tensor,
    rows: Pass,
) -> StepMetadata:
    """Add queries of windows that must wait though their rows have a token beyond.

    Args:
        step: The plan of the pass, in which these rows are dense.
        planner: Of its layers.
        common: The pass.
        lengths: Tokens after the pass, on the host, ``[R]``.
        rows: Its rows.
    """
    if rows.parking is None:
        return step
    assert _rows is not None
    count = common.num_reqs
    asked = torch.full_like(rows.prompt_lens, AS_SET) if _rows.controls is None else _rows.controls
    rule = planner.rules.find_on_host(
        rows.prompt_lens, torch.where(rows.parking, asked[:count], DENSE)
    )
    start, table = common.query_start_loc_cpu[: count + 1], common.block_table_tensor[:count]
    ends = _rows.ends[:count]
    found = planner.prompts.ending(start, lengths, rows.prompt_lens, rule, table, count_nothing)
    waiting = []
    for prompt in found:
        row = int(torch.searchsorted(start, prompt.first_token, right=True)) - 1
        last = min(prompt.last_token, int(start[row + 1] - (lengths[row] - ends[row])))
        if prompt.first_token < last:
            waiting.append(replace(prompt, last_token=last, compacts=False))
    return replace(step, prompts=(*step.prompts, *waiting))
