# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The sizing page computes what ``vllm-sparse plan`` computes, to the block and byte."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.published import result
from vllm_sparse.planner.devices import DEVICES
from vllm_sparse.planner.model import Model
from vllm_sparse.planner.plan import Question, answer
from vllm_sparse.policies.rocketkv import RocketKVSettings
from vllm_sparse.policies.sparda import SpardaSettings

SCRIPTS = Path(__file__).parents[2] / "docs/javascripts"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")

GIB = 1 << 30
ANSWERS = """
const plan = require("./plan.js"), models = require("./plan_models.js");
const asked = JSON.parse(require("fs").readFileSync(0, "utf8"));
const { DEVICES, ROCKETKV, SPARDA } = plan;
const answers = asked.map((one) => plan.answer({ ...one, config: models[one.name] }));
console.log(JSON.stringify({ models, DEVICES, ROCKETKV, SPARDA, answers }));
"""
SETTINGS = (
    {},
    {"ROCKETKV": {"token_budget": 256}, "SPARDA": {"top_k": 48, "dense_len": 0}},
    {"ROCKETKV": {"token_budget": 2000}, "SPARDA": {"local_blocks": 2, "top_k": 32}},
    {"ROCKETKV": {"token_budget": 1000}, "SPARDA": {"top_k": 20}},  # refused
)
CONTEXTS = (1000, 4096, 7936, 30000, 100001)


def questions(models):
    """A grid in which each value of a thing meets each of every other often."""
    devices = [(key, device.memory_gib, None) for key, device in DEVICES.items()]
    devices += [("h100", 60.5, 3000), ("cpu", 0.0, 33.3)]
    grid = itertools.product(models, CONTEXTS, (1, 8, 100))
    for number, (name, context, concurrency) in enumerate(grid):
        device, memory, bandwidth = devices[number % len(devices)]
        yield {
            "name": name, "context": context, "output": (256, 1024)[number % 2],
            "concurrency": concurrency, "device": device, "deviceGib": memory,
            "bandwidth": bandwidth, "hostGib": (512, 40.3, 3)[number // 2 % 3],
            "kvGib": None if memory and number % 3 else 4.7, "ranks": (1, 2, 4)[number // 5 % 3],
            "settings": SETTINGS[number // 3 % 4],
        }  # fmt: skip


def page(asked):
    done = subprocess.run(
        [NODE, "-e", ANSWERS], cwd=SCRIPTS, input=json.dumps(asked),
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(config, asked, backend):
    """The same question, asked of the command's own functions."""
    device = DEVICES[asked["device"]]
    if asked["bandwidth"]:
        measured = asked["bandwidth"] * 1e9
        link = device.link_bytes_per_s if device.launch_us else measured
        device = device._replace(bytes_per_s=measured, link_bytes_per_s=link)
    pool = asked["kvGib"]
    model = Model(Path("/nowhere"), config, asked["context"] + asked["output"])
    question = Question(
        model, asked["name"], asked["context"], asked["output"], asked["concurrency"], device,
        int(asked["deviceGib"] * GIB), int(asked["hostGib"] * GIB), asked["ranks"],
        kv_bytes=None if pool is None else int(pool * GIB),
        settings=asked["settings"].get(backend, {}),
    )  # fmt: skip
    return asdict(answer(question, backend))


@pytest.fixture(scope="module")
def said():
    asked = list(questions(page([])["models"]))
    return asked, page(asked)


def test_answers_are_the_command_s(said):
    asked, found = said
    served = dict.fromkeys(("dense", "ROCKETKV", "SPARDA"), 0)
    for question, arms in zip(asked, found["answers"], strict=True):
        for arm in arms:
            if (
                arm["name"] == "SPARDA"
                and question["settings"].get("SPARDA", {}).get("top_k") == 20
            ):
                assert arm["refused"]  # the command says so before it plans
                continue
            ours = command(found["models"][question["name"]], question, arm["name"])
            assert bool(arm["refused"]) == bool(ours["refused"]), (question, arm, ours)
            if ours["refused"]:
                continue
            served[arm["name"]] += 1
            for key in set(ours) - {"left_out", "refused"}:
                expected = ours[key]
                if isinstance(expected, float):
                    expected = pytest.approx(expected, rel=1e-12)
                assert arm[key] == expected, (key, question)
    assert min(served.values()) > 40


def test_devices_and_defaults_are_the_command_s(said):
    _, found = said
    names = {
        "name": "name", "memory_gib": "memoryGib", "bytes_per_s": "bytesPerS",
        "link_bytes_per_s": "linkBytesPerS", "launch_us": "launchUs", "block_size": "blockSize",
        "policy_block_size": "policyBlockSize",
        "batched_tokens": "batchedTokens",
    }  # fmt: skip
    for key, device in DEVICES.items():
        told = device._asdict()
        del told["flash_attention"]  # of refusals, which the page does not know
        assert found["DEVICES"][key] == {names[k]: v for k, v in told.items()}
    rocket, paged = RocketKVSettings(), SpardaSettings()
    assert found["ROCKETKV"].pop("page_size") == rocket.page_sizes[0]
    assert found["ROCKETKV"] == {key: getattr(rocket, key) for key in found["ROCKETKV"]}
    assert found["SPARDA"].pop("top_k") == paged.blocks_read
    assert found["SPARDA"] == {key: getattr(paged, key) for key in found["SPARDA"]}


def test_the_page_says_which_shares_of_misses_were_measured():
    text = (SCRIPTS.parent / "plan.md").read_text()
    cells = result("blocks-qwen")["cells"]
    for blocks, said in (("16", "16 to 31 % with 16 blocks"), ("32", "10 to 23 % with 32")):
        shares = [
            arm[blocks]["miss_rate"] for cell in cells
            for name, arm in cell["selectors"].items() if name != "exact"
        ]  # fmt: skip
        assert f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" in said
        assert said in " ".join(text.split())
