# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whose hashes and ids these are."""

from __future__ import annotations

import pytest
from support.scheduler import BLOCK, Machine, prompts

from vllm_sparse.control import AS_SET
from vllm_sparse.kv import requests
from vllm_sparse.kv.requests import case_of, of_hashes, of_id

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_an_id_that_is_taken_stays_its_request_s(llama):
    """vLLM refuses another request with it, and goes on with the first."""
    machine, other = Machine(llama, blocks=60), Machine(llama, blocks=20)
    request = machine.add(prompts(1)[0])
    machine.step()
    machine.serial -= 1
    with pytest.raises(AssertionError, match="duplicate"):
        machine.add([2] * 30)
    assert of_id(machine.pool, request.request_id) is request
    assert of_id(other.pool, request.request_id) is None
    machine.run()
    assert machine.free_blocks() == 59


def test_hashes_are_those_of_the_request_that_has_them(llama):
    request = Machine(llama, blocks=20).add([1] * 3 * BLOCK)
    before = request.block_hashes
    assert of_hashes(before) is request
    request.block_hashes = list(before)
    assert of_hashes(before) is None


def test_what_a_request_says_is_read_once(llama, monkeypatch):
    """Every step asks for it, and a client may say a lot."""
    reads = []
    monkeypatch.setattr(requests, "control_of", lambda said: reads.append(said) or AS_SET)
    machine = Machine(llama, blocks=60)
    request = machine.add(prompts(1)[0], new_tokens=30)
    machine.run()
    assert case_of(request) == (400, AS_SET)
    assert len(reads) == 1
