# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forced texts: what the logits processor leaves to sample, and what it records."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import commands
from benchmarks.commands import FREE

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def processor(forced, record_to=None):
    """Of a request with such parameters."""
    from benchmarks import teacher

    params = teacher.sampling_params(forced, record_to)
    return teacher.ForcedTokens.new_req_logits_processor(SimpleNamespace(), params)


def through(request, rows):
    """The tokens that are generated, greedily."""
    done: list[int] = []
    for row in rows:
        done.append(int(request(done, row.clone()).argmax()))
    return done


def test_a_free_token_is_the_model_s_and_others_are_the_text_s():
    rows = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    best = rows.argmax(-1).tolist()
    other = [(token + 1) % 11 for token in best]
    assert through(processor(other), rows) == other
    mixed = [other[0], FREE, FREE, other[3]]
    assert through(processor(mixed), rows) == [other[0], best[1], best[2], other[3]]


def test_every_row_is_recorded_only_where_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    through(processor([5, FREE, 2]), rows)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "rows.npy"
    through(processor([5, FREE, 2], str(path)), rows)
    np.testing.assert_allclose(np.load(path), rows.log_softmax(-1).numpy(), rtol=1e-6)


@pytest.mark.parametrize("generated", [[5, 9, 3], [5, 9], [5, 9, 2, 2]])
def test_another_text_than_the_forced_one_is_an_error(generated):
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=generated)])
    llm = SimpleNamespace(generate=lambda *_, **__: [output])
    with pytest.raises(RuntimeError, match="did not generate the forced tokens"):
        commands.force(llm, [[1]], [[5, FREE, 2]])


def test_what_was_generated_is_returned():
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=(5, 9, 2))])
    llm = SimpleNamespace(generate=lambda *_, **__: [output])
    assert commands.force(llm, [[1]], [[5, FREE, 2]]) == [[5, 9, 2]]
