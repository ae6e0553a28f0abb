# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Targets and tables of the GPU benchmark."""

from __future__ import annotations

import re

import pytest

from benchmarks.gpu import verdicts


def measured(step_ms: float, bound_ms: float, **row) -> dict:
    summary = {"median": step_ms}
    rate = 1e3 * row["batch"] / step_ms
    least = {"bound_ms": bound_ms, "least_bytes": bound_ms * 4.3e9}
    common = {"tokens_per_s": rate, "preemptions": 0, "predicted_ms": 1.5 * bound_ms, **least}
    return {"step_ms": summary, "wanted": row["batch"], **common, **row}


def forced(arm: str, step_ms: float, bound_ms: float, batch: int) -> dict:
    row = {"arm": arm, "rate": 0.1, "new_share": 0.097, "context": 32000, "fetched_mib": 228.0}
    row = measured(step_ms, bound_ms, batch=batch, as_forced=True, **row)
    del row["wanted"], row["preemptions"]
    return row if arm == "resident" else {**row, "exposed_wait_ms": 3.5}


def results_of_a_bench() -> dict[str, dict]:
    thousand = 1024
    dense = [
        measured(4.0, 3.6, context=16 * thousand, batch=1),
        measured(5.0, 4.5, context=32 * thousand, batch=1),
        measured(30.0, 27.0, context=32 * thousand, batch=27, wanted="most"),
        {"context": 32 * thousand, "second_token_s": 1.0},
        {"context": 32 * thousand, "second_token_s": 1.04},
        {"context": 128 * thousand, "second_token_s": 14.0},
        {"context": 8 * thousand, "wanted": "most", "batch": 99, "skipped": "no time"},
    ]
    ours = [
        measured(4.0, 3.1, context=16 * thousand, batch=1),
        measured(4.0, 3.5, context=32 * thousand, batch=1),
        measured(6.0, 4.0, context=32 * thousand, batch=27),
        measured(9.0, 8.0, context=32 * thousand, batch=108, wanted="most"),
        *(
            {"context": 32 * thousand, "second_token_s": seconds, "predicted_s": 0.7}
            for seconds in (1.03, 1.04, 9.0)
        ),
        {"context": 128 * thousand, "second_token_s": 14.0},
    ]
    blocking = {**forced("blocking", 10.0, 9.0, 19), "in_flight_gb_per_s": 48.0}
    paged = [blocking, forced("prefetch", 6.0, 5.0, 19), {"rate": 0.2, "skipped": "no time"}]
    resident = [forced("resident", 4.2, 4.0, 4)]
    kernel = {"kernel": "append", "context": 8192, "budget": 256, "batch": 1, "block_size": 64}
    kernel |= {"us": 4.0, "predicted_us": 5.5, "gb_per_s": 12.0, "share_of_copy": 0.003}
    failed = {"kernel": "select slots", "error": "no kernel image"}
    fetched = {"kernel": "copy pieces", "programs": 32, "context": 32768, "batch": 16}
    fetched |= {
        "misses": 307,
        "us": 200.0,
        "predicted_us": 160.0,
        "gb_per_s": 50.0,
        "share_of_link": 0.9,
    }
    status = {"status": "ok", "reason": "", "seconds": 1.0}
    link = {"link_gb_per_s": {"host_to_device": 55.0}, "device_kv_gib": 4.2}
    link |= {"plan": {"device_gib": 4.17}, "graphs": "CUDAGraphMode.FULL_DECODE_ONLY"}
    return {
        "kernels-sparda": {**status, "rows": [fetched, failed], "facts": {"link_gb_per_s": 55.0}},
        "kernels": {**status, "rows": [kernel, failed], "facts": {"copy_gb_per_s": 4300.0}},
        "sparda-offload": {**status, "rows": paged, "facts": link},
        "sparda-resident": {**status, "rows": resident, "facts": link},
        "dense": {**status, "rows": dense, "facts": {}},
        "rocket-1024": {**status, "rows": ours, "facts": {"graphs": "X.FULL_DECODE_ONLY"}},
    }


def reached(results: dict[str, dict]) -> dict[str, str]:
    return {target.what: target.verdict for target in verdicts.targets(results)}


def test_targets_are_judged_next_to_their_bounds():
    results = results_of_a_bench()
    results["rocket-1024"]["rows"][2]["predicted_ms"] = 5.0
    found = {target.what: target for target in verdicts.targets(results)}
    unknown = "not measured"
    assert {what: target.verdict for what, target in found.items()} == {
        "16K, batch 1, t = 1024: x dense": "no",
        "32K, batch 1, t = 1024: x dense": "yes",
        "128K, batch 1, t = 1024: x dense": unknown,
        "32K, stock's largest batch, t = 1024: x dense": "no",
        "16K, batch 1, t = 256: x dense": unknown,
        "32K, batch 1, t = 256: x dense": unknown,
        "128K, batch 1, t = 256: x dense": unknown,
        "32K, stock's largest batch, t = 256: x dense": unknown,
        "32K, t = 1024: largest batch over stock's": "yes",
        "prompt overhead at 32K, t = 1024, %": "yes",
        "prompt overhead at 128K, t = 1024, %": unknown,  # once is not enough
        "SPARDA, 10% misses: tokens/s, prefetch over blocking": "yes",
        "SPARDA, 10% misses: tokens/s, over all resident": "no",
    }
    batched = found["32K, stock's largest batch, t = 1024: x dense"]
    assert batched.found == pytest.approx(5.0)
    assert batched.bound == pytest.approx(27 / 4)
    assert batched.predicted == pytest.approx(1.5 * 27 / 5)
    assert re.search(r"6\.75 +8\.1 +no\n", verdicts.summary(results)[0])
    assert found["32K, t = 1024: largest batch over stock's"].found == 4.0
    overhead = found["prompt overhead at 32K, t = 1024, %"]
    assert overhead.found == pytest.approx(100 * (1.04 / 1.02 - 1))  # medians
    ahead = found["SPARDA, 10% misses: tokens/s, prefetch over blocking"]
    assert (ahead.found, ahead.bound) == (pytest.approx(10 / 6), pytest.approx(9 / 5))
    resident = found["SPARDA, 10% misses: tokens/s, over all resident"]
    assert resident.found == pytest.approx(19 / 4 * 4.2 / 6)
    assert resident.bound == pytest.approx(19 / 4 * 4 / 5)
    seldom = {"rows": [{"context": 128 * 1024, "second_token_s": 15.0}]}
    results |= {"dense-more": seldom, "rocket-1024-more": seldom}
    assert reached(results)["prompt overhead at 128K, t = 1024, %"] == "yes"
    results["rocket-1024"]["rows"][1]["step_ms"]["median"] = 5.0
    assert reached(results)["32K, batch 1, t = 1024: x dense"] == "no"


def test_what_did_not_run_as_it_was_to_reaches_no_target():
    results = results_of_a_bench()
    results["sparda-offload"]["rows"][0]["as_forced"] = False
    results["rocket-1024"]["rows"][3]["preemptions"] = 2
    results["dense"]["rows"][0]["preemptions"] = 1
    found = reached(results)
    for what in (
        "SPARDA, 10% misses: tokens/s, prefetch over blocking",
        "32K, t = 1024: largest batch over stock's",
        "16K, batch 1, t = 1024: x dense",
    ):
        assert found[what] == "not measured"


def test_tables_show_what_was_measured():
    text, further = verdicts.summary(results_of_a_bench())
    assert "not measured" in text
    assert re.search(r"append +8192 +1 +4 +5\.5 +12 +256 +64 +0\.003", text)
    assert re.search(r"copy pieces +32768 +16 +200 +160 +50 +32 +307 +- +0\.9", text)
    assert re.search(r"sparda-offload: 4\.17 of 4\.2 GiB .* link 55", text)
    assert re.search(r"blocking +32000 +19 +9\.7 +10 +13\.5 +- +9 +3\.5 +1900 +228 +48 +True", text)
    assert re.search(r"prefetch +32000 +19 +9\.7 +6 +7\.5 +- +5 +3\.5 +3167 +228 +- +True", text)
    assert re.search(r"rocket-1024 +32768 +27 +6 +6 +- +4 +4500 +0 +5 +6\.75", text)
    assert re.search(r"rocket-1024 +32768 +3 +1\.04 +0\.7 +1\.03", text)
    assert re.search(r"rocket-1024 +FULL_DECODE_ONLY", text)
    assert [verdict["reached"] for verdict in further["targets"]][1] == "yes"
    assert verdicts.summary({})[1]["targets"][0]["reached"] == "not measured"
