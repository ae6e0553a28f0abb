# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tails that are copied for the prefix cache: vLLM's real scheduler, and what its blocks hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.scheduler import BLOCK, Machine, follow_events, prompts, random_lives

from vllm_sparse.kv.copies import PrefixCopies
from vllm_sparse.metrics import counters
from vllm_sparse.metrics.definitions import METRICS
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPT = prompts(1)[0]


@pytest.fixture
def skipped():
    """How many blocks were not copied during a test so far, by reason."""
    name = "prefix_blocks_not_copied"
    reasons = [reason.value for reason in METRICS[name].reasons]
    before = {reason: counters().value(name, reason) for reason in reasons}

    def grown():
        values = {reason: counters().value(name, reason) - before[reason] for reason in reasons}
        return {reason: value for reason, value in values.items() if value}

    return grown


def hash_late(machine, tokens):
    """Hash blocks once so many tokens behind them are known, as vLLM 0.33 does for drafters."""
    at_once = machine.hasher

    def hasher(request):
        known, ready = len(request.block_hashes), (request.num_tokens - tokens) // BLOCK
        return at_once(request)[: max(ready - known, 0)]

    machine.hasher = hasher


def limits(machine, length=400):
    """Tokens that are shared as they are, and those that a request may hit."""
    policy = machine.policy
    return policy.publishable_tokens(length), policy.hittable_blocks(length) * BLOCK


def published(machine, tokens):
    """How many leading blocks of a text the cache has, and how many blocks in all have them."""
    hashes = machine.hasher(machine_request(machine, tokens))
    found = [machine.pool.get_cached_block(h, [0]) for h in hashes]
    lead = found.index(None) if None in found else len(found)
    return lead


def machine_request(machine, tokens):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id="looked up", prompt_token_ids=tokens, sampling_params=SamplingParams(),
        pooling_params=None,
    )  # fmt: skip


@pytest.mark.parametrize("ahead", [0, 1])
def test_another_turn_hits_the_whole_prompt_and_the_same_prompt_all_but_its_window(llama, ahead):
    machine = Machine(llama, blocks=120, ahead=ahead)
    shared, hits = limits(machine)
    assert shared + 3 * BLOCK < hits
    assert machine.serve(PROMPT) == 0
    assert published(machine, PROMPT) == 400 // BLOCK
    assert machine.serve([*PROMPT, *range(200)]) == 400 // BLOCK * BLOCK
    assert machine.serve(PROMPT) == hits
    assert machine.free_blocks() == 119


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("late", [1, 3])
def test_a_block_without_a_hash_is_not_copied(llama, ahead, late):
    """The prompt's last, if its hash covers outputs that no step has given when it is copied."""
    machine = Machine(llama, blocks=120, ahead=ahead)
    hash_late(machine, late)
    assert machine.serve(PROMPT) == 0
    known = late == 1 and not ahead
    assert published(machine, [*PROMPT, 7, 7, 7]) == 400 // BLOCK - (not known)
    assert machine.serve(PROMPT) == limits(machine)[1]
    assert machine.free_blocks() == 119


def test_two_requests_with_one_prefix_at_once(llama, skipped):
    """Both copy what they hit; the second finds that the first has copied what both left."""
    machine = Machine(llama, blocks=160)
    machine.serve(PROMPT)
    before, out = machine.copied, counters().value("prefix_blocks_copied_out")
    tokens = counters().value("prefix_tokens_copied_in")
    both = [machine.add(PROMPT), machine.add(PROMPT)]
    machine.run()
    shared, hits = limits(machine)
    assert [machine.first_hits[request.request_id] for request in both] == [hits, hits]
    assert machine.copied - before == 2 * (hits - shared) // BLOCK
    assert counters().value("prefix_blocks_copied_out") == out
    assert counters().value("prefix_tokens_copied_in") - tokens == 2 * (hits - shared)
    assert skipped() == {}
    assert machine.free_blocks() == 159


def test_a_pool_without_room_copies_nothing_and_serves_all(llama, skipped):
    """Of 26 blocks a prompt takes 25 and its output one: neither its tail nor its hit fit twice."""
    machine = Machine(llama, blocks=27)
    assert machine.serve(PROMPT) == 0
    assert machine.copied == 0
    shared = limits(machine)[0]
    assert skipped() == {"pool_short": 400 // BLOCK - shared // BLOCK}
    assert machine.serve(PROMPT) == shared
    assert machine.free_blocks() == 26


def test_a_hit_is_cut_to_what_fits_beside_its_copies(llama, skipped):
    """All of the tail is in the cache, but prompt, hit and copies are more than the pool."""
    machine = Machine(llama, blocks=32)
    machine.serve(PROMPT, new_tokens=1)
    shared, hits = limits(machine)
    assert published(machine, PROMPT) == 400 // BLOCK
    fits = 31 - 26
    assert fits < (hits - shared) // BLOCK
    assert machine.serve(PROMPT, new_tokens=1) == shared + fits * BLOCK
    assert machine.copied == fits
    assert skipped() == {"hit_cut": (hits - shared) // BLOCK - fits}
    assert machine.free_blocks() == 31


def test_who_fits_without_copies_does_not_wait_for_them(llama):
    machine = Machine(llama, blocks=32)
    machine.serve(PROMPT, new_tokens=1)
    machine.add([9] * 20, new_tokens=60)
    machine.step()
    request = machine.add(PROMPT)
    machine.step()
    shared, hits = limits(machine)
    assert shared < machine.first_hits[request.request_id] < hits
    machine.run()


def test_a_hit_in_blocks_that_are_in_use_needs_room_for_copies_only(llama):
    """Without it the request would have to compute as many blocks."""
    machine = Machine(llama, blocks=42 + 15 + 1)
    machine.add([*PROMPT, *[9] * 260], new_tokens=1)
    for _ in range(6):
        machine.step()
    request = machine.add(PROMPT, new_tokens=1)
    machine.run()
    assert machine.first_hits[request.request_id] == limits(machine)[1]


def test_waiting_for_blocks_costs_no_hit(llama, skipped):
    machine = Machine(llama, blocks=80)
    machine.serve(PROMPT)
    held = machine.pool.get_new_blocks(54)
    request = machine.add([*PROMPT, *range(200)])
    for _ in range(40):
        machine.step()
    assert not machine.first_hits.keys() & {request.request_id}
    machine.pool.free_blocks(held)
    machine.run()
    assert machine.first_hits[request.request_id] == 400
    assert skipped() == {}


def test_a_request_that_ends_with_its_prompt_leaves_its_tail(llama):
    machine = Machine(llama, blocks=60)
    machine.serve(PROMPT, new_tokens=1)
    assert machine.copied == 0
    assert published(machine, PROMPT) == 400 // BLOCK
    assert machine.serve(PROMPT, new_tokens=1) == limits(machine)[1]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("leave", ["aborted", "preempted"])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_whoever_leaves_when_the_prompt_has_just_ended(llama, ahead, leave, late):
    """The prompt takes five steps. Nothing that is not whole is published, nothing is lost."""
    for steps in range(3, 9):
        machine = Machine(llama, blocks=120, ahead=ahead)
        hash_late(machine, late)
        request = machine.add(PROMPT, new_tokens=20)
        for _ in range(steps):
            machine.step()
        if leave == "aborted":
            machine.abort(request)
        else:
            machine.scheduler.running.remove(request)
            machine.scheduler._preempt_request(request, 0.0)
        machine.run()
        assert machine.free_blocks() == 119
        shared, hits = limits(machine)
        # The fifth step is processed, or the one behind it planned, which copies; a request that
        # comes back with output has a chunk with tokens of both, and compacts in its midst.
        kept = steps >= 5 + ahead or (leave == "preempted" and steps < 5)
        assert machine.serve(PROMPT) == (hits if kept else shared)


def test_a_step_copies_so_much_and_no_more(llama, monkeypatch, skipped):
    from vllm_sparse.kv import spec

    machine = Machine(llama, blocks=160)
    page = machine.manager.kv_cache_spec.page_size_bytes
    monkeypatch.setattr(spec, "LEAST_COPIED_BYTES", 3 * page)
    shared = limits(machine)[0]
    machine.serve(PROMPT)
    assert published(machine, PROMPT) == shared // BLOCK + 3
    assert skipped() == {"step_limit": 400 // BLOCK - shared // BLOCK - 3}
    two = [machine.add(PROMPT), machine.add(PROMPT)]
    machine.step()
    assert machine.copied == 3 + 3, "the second waits for the next step"
    machine.run()
    for request in two:
        assert machine.first_hits[request.request_id] == shared + 3 * BLOCK


def test_a_longer_hit_is_cut_to_what_a_step_copies(llama, monkeypatch, skipped):
    from vllm_sparse.kv import spec

    machine = Machine(llama, blocks=160)
    machine.serve(PROMPT)
    page = machine.manager.kv_cache_spec.page_size_bytes
    monkeypatch.setattr(spec, "LEAST_COPIED_BYTES", 3 * page)
    shared, hits = limits(machine)
    assert machine.serve(PROMPT, new_tokens=1) == shared + 3 * BLOCK
    assert skipped() == {"step_limit": (hits - shared) // BLOCK - 3}


@pytest.mark.parametrize("copied_bytes", [0, 1 << 20])
def test_turns_that_come_at_once_begin_at_once_if_a_step_may_copy_their_hits(
    llama, monkeypatch, copied_bytes
):
    from vllm_sparse.kv import spec

    machine = Machine(
        llama, blocks=500, max_num_seqs=8, max_num_batched_tokens=2048, copied_bytes=copied_bytes
    )
    machine.serve(PROMPT)
    page = machine.manager.kv_cache_spec.page_size_bytes
    monkeypatch.setattr(spec, "LEAST_COPIED_BYTES", 14 * page)
    assert 8 * 14 * page < 1 << 20
    eight = [machine.add([*PROMPT, *[90 + turn] * 80]) for turn in range(8)]
    machine.step()
    assert len(machine.scheduler.running) == (8 if copied_bytes else 1)
    machine.run()
    assert {machine.first_hits[request.request_id] for request in eight} == {400}


@pytest.mark.parametrize("new_tokens", [1, 8], ids=["leaves its tail", "copies it"])
def test_an_event_names_the_tokens_of_its_blocks_and_no_others(llama, monkeypatch, new_tokens):
    """What routers follow; between two blocks of a tail one is in the cache already."""
    machine = Machine(llama, blocks=120)
    machine.serve(PROMPT)
    hashes = machine.hasher(machine_request(machine, PROMPT))
    first = limits(machine)[0] // BLOCK
    gone = [machine.pool.get_cached_block(hashes[first + place], [0])[0] for place in (1, 3)]
    machine.pool.evict_blocks({block.block_id for block in gone})
    machine.pool.enable_kv_cache_events = True
    monkeypatch.setattr(machine.scheduler.kv_cache_manager, "take_events", lambda: None)
    machine.serve(PROMPT, new_tokens)
    stored = [x for x in machine.pool.take_events() if hasattr(x, "token_ids")]
    assert [len(event.block_hashes) for event in stored] == [1, 1]
    for event, place in zip(stored, (first + 1, first + 3), strict=True):
        assert event.token_ids == PROMPT[place * BLOCK : (place + 1) * BLOCK]


def test_switched_off_prompts_hit_what_they_drop(llama):
    machine = Machine(llama, blocks=120, settings={"keep_prefixes": False})
    shared = limits(machine)[0]
    machine.serve(PROMPT)
    assert machine.serve([*PROMPT, *range(200)]) == machine.serve(PROMPT) == shared
    assert machine.copied == 0


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("new_tokens", [1, 8], ids=["ends with the prompt", "runs on"])
def test_a_prefix_is_evicted_from_its_end_on(llama, turns, new_tokens):
    """What a later turn has hit, and copies of its own, are as recent as the rest."""
    machine = Machine(llama, blocks=120)
    texts = [PROMPT, [*PROMPT, *range(200)]][:turns]
    for text in texts:
        machine.serve(text, new_tokens)
    whole, leads = len(texts[-1]) // BLOCK, []
    for _ in range(whole):
        block = machine.pool.get_new_blocks(1)
        leads.append(published(machine, texts[-1]))
        while leads[-1] == whole:
            block += machine.pool.get_new_blocks(1)
            leads[-1] = published(machine, texts[-1])
    assert leads == list(range(whole - 1, -1, -1))


def test_what_was_copied_of_a_running_request_is_evicted_from_its_end_on(llama):
    machine = Machine(llama, blocks=120)
    machine.add(PROMPT, new_tokens=200)
    for _ in range(12):
        machine.step()
    whole, shared = 400 // BLOCK, limits(machine)[0] // BLOCK
    assert published(machine, PROMPT) == whole
    leads = {whole}
    while min(leads) > shared:
        machine.pool.get_new_blocks(1)
        leads.add(published(machine, PROMPT))
    assert leads == set(range(shared, whole + 1))


def test_without_a_prefix_cache_blocks_are_freed_and_nothing_is_copied(llama):
    """As vLLM does then, requests have no hashes."""
    machine = Machine(llama, blocks=60, enable_prefix_caching=False)
    machine.hasher = None
    assert machine.serve(PROMPT) == machine.serve(PROMPT) == 0
    machine.serve(PROMPT, new_tokens=1)
    assert machine.copied == 0
    assert machine.free_blocks() == 59


def test_a_prompt_is_as_recent_as_its_last_output(llama):
    """Though nobody held it meanwhile: who replies at length loses nothing to who came later."""
    machine = Machine(llama, blocks=120)
    machine.add(PROMPT, new_tokens=60)
    machine.add(other := prompts(1, first=2)[0], new_tokens=4)
    machine.run()
    while published(machine, other):
        machine.pool.get_new_blocks(1)
        assert published(machine, PROMPT) == 400 // BLOCK


def test_copying_out_preempts_nobody(llama):
    """The other prompt needs six blocks in the step that copies, when eight are free."""
    machine = Machine(llama, blocks=40, scheduler_reserve_full_isl=True)
    machine.add(PROMPT)
    machine.add([2] * 208)
    machine.run()
    assert machine.preemptions == 0


@pytest.mark.parametrize(
    ("kind", "length", "engine"),
    [
        (RocketKV, 40, {}),
        (Quest, 400, {}),
        (RocketKV, 400, {"enable_prefix_caching": False}),
    ],
    ids=["a dense prompt", "QUEST", "no prefix cache"],
)
def test_where_nothing_is_copied_nobody_asks_for_room(llama, monkeypatch, kind, length, engine):
    """What running requests may take is summed over all of them: hundreds, for each prompt."""
    monkeypatch.setattr(PrefixCopies, "_wanted", lambda _: pytest.fail("looks for room"))
    machine = Machine(
        llama, blocks=300, kind=kind, max_num_seqs=8, max_num_batched_tokens=4000, **engine
    )
    for prompt in prompts(8, length):
        machine.add(prompt)
    machine.run()
    assert machine.copied == 0


def test_prompts_that_end_together_count_what_others_want_once(llama, monkeypatch):
    """Where the pool has room for all; each of them copies what it would alone."""
    counts, wanted = [], PrefixCopies._wanted
    monkeypatch.setattr(PrefixCopies, "_wanted", lambda self: counts.append(1) or wanted(self))
    machine = Machine(llama, blocks=400, max_num_seqs=8, max_num_batched_tokens=4000)
    for prompt in prompts(8):
        machine.add(prompt)
    machine.run()
    shared = limits(machine)[0]
    assert machine.copied == 8 * (400 // BLOCK - shared // BLOCK)
    assert counts == [1]


def test_copies_of_a_step_that_does_not_take_place_are_not_published(llama, monkeypatch):
    """As above, if nothing were kept for the other, which is the more urgent one."""
    monkeypatch.setattr(PrefixCopies, "_wanted", lambda _: 0)
    machine = Machine(llama, blocks=40, scheduling_policy="priority")
    machine.add(PROMPT, priority=1)
    machine.step()
    machine.add([2] * 208)
    machine.run()
    assert machine.preemptions > 0
    assert machine.free_blocks() == 39


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_a_step_would_have_computed_of_whom_it_preempts_is_not_hit(llama, ahead):
    """It is published when the step is planned, before a more urgent request needs its room."""
    machine = Machine(
        llama, blocks=60, ahead=ahead, scheduling_policy="priority", long_prefill_token_threshold=48
    )
    held = machine.pool.get_new_blocks(45)
    victim = machine.add(PROMPT, priority=1)
    machine.step()
    urgent = machine.add([9] * 32)
    machine.step()
    assert (victim.num_computed_tokens, urgent.num_computed_tokens) == (144, 32)
    assert machine.free_blocks() == 3, "what the victim's next chunk takes"
    machine.step()
    assert machine.preemptions == 1
    assert published(machine, PROMPT) == 144 // BLOCK < limits(machine)[0] // BLOCK
    machine.pool.free_blocks(held)
    machine.run()
    assert machine.free_blocks() == 59


def test_engines_of_one_process_do_not_mix(llama):
    """Their requests may have the same ids."""
    one, other = Machine(llama, blocks=120), Machine(llama, blocks=60)
    long, short = one.add(PROMPT), other.add([9] * 50, new_tokens=40)
    assert long.request_id == short.request_id
    for _ in range(40):
        one.step()
        other.step()
    assert (one.free_blocks(), other.free_blocks()) == (119, 59)
    assert one.serve([*PROMPT, *range(200)]) == 400 // BLOCK * BLOCK


def test_who_copies_nothing_waits_for_no_copies():
    """vLLM's own copies, of blocks that others hit in part, may be more than ours may be."""
    manager = SimpleNamespace(
        block_pool=SimpleNamespace(num_gpu_blocks=99),
        kv_cache_spec=SimpleNamespace(most_copies=2),
        _pending_cow_copies=[None] * 3,
    )
    assert PrefixCopies(manager).blocks_needed("a", [], 0) == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_lives(llama, seed):
    """Beside steps that are planned ahead."""
    policy = "priority" if seed % 2 else "fcfs"
    machine = Machine(
        llama, blocks=40 + 8 * (seed % 3), ahead=seed // 2 % 2, seed=seed, scheduling_policy=policy
    )
    believed, events = follow_events(machine)
    random_lives(machine)
    assert machine.copied > 0
    assert believed
    assert {event[0] for event in events} == {"BlockStored", "BlockRemoved"}
