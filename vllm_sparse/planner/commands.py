# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``vllm-sparse plan``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.planner.devices import DEVICES

if TYPE_CHECKING:
    from vllm_sparse.planner.devices import Device
    from vllm_sparse.planner.plan import Arm, Question

REFUSED, TOO_MANY = 3, 4
_GIB = 1 << 30
_CONTEXT = 32768
ALL_FRAMES = "every block has a frame, so nothing is fetched and no device memory is saved"


def add_command(subparsers: Any) -> None:
    """Adds ``vllm-sparse plan``."""
    parser = subparsers.add_parser(
        "plan",
        help="tell from a config.json what each backend would need and gain",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Blocks, bytes, requests at once and a bound of the decode step for dense and\n"
        "sparse attention, from a config.json alone. Times are bytes over an estimated\n"
        "bandwidth plus launches: a bound, not a measurement.",
        epilog="exit status: 0 the backend serves this; 1 an error; 2 wrong options;\n"
        f"{REFUSED} the backend (without --backend: each) refuses it; "
        f"{TOO_MANY} fewer than --concurrency requests fit",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="config.json, its folder, or a model of a local cache")
    add("--context", type=int, help=f"prompt tokens (default: {_CONTEXT}, or what the model takes)")
    add("--output", type=int, default=256, help="generated tokens (default: %(default)s)")
    add("--concurrency", type=int, default=8, help="requests at once (default: %(default)s)")
    add("--device", choices=DEVICES, default="h100", help="kind (default: %(default)s)")
    add("--bandwidth", type=float, metavar="GB/S", help="of its memory, instead of an estimate")
    add("--device-memory", type=float, metavar="GIB", help="of one device")
    add("--host-memory", type=float, metavar="GIB", help="free (default: this machine's)")
    add("--kv-memory", type=float, metavar="GIB", help="pool of a rank; on CPUs 4 if unset")
    add("--tensor-parallel-size", type=int, default=1, help="(default: %(default)s)")
    add("--block-size", type=int, help="tokens per block (default: vLLM's)")
    add("--backend", type=str.upper, help="plan this one")
    add("--settings", type=json.loads, default={}, help="JSON, of --backend")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from vllm_sparse.planner.plan import answer
    from vllm_sparse.planner.times import DENSE
    from vllm_sparse.registry import entries

    chosen = arguments.backend
    if chosen and chosen not in entries():
        raise UnsupportedError(f"--backend {chosen} is none of {', '.join(entries())}")
    if arguments.settings and not chosen:
        raise UnsupportedError("--settings belong to one backend; choose it with --backend")
    question = _question(arguments)
    shown = [chosen] if chosen else [name for name, entry in entries().items() if entry.preset]
    sparse = [answer(question, name) for name in shown]
    arms = [answer(question, DENSE), *sparse]
    if arguments.json:
        plans = [asdict(arm) for arm in arms]
        print(json.dumps({"arms": plans, "machine": _machine()}, indent=1))
    else:
        print("\n\n".join([*(_text(arm, question) for arm in arms), _here(**_machine())]))
    able = [arm for arm in sparse if not arm.refused]
    if not able:
        return REFUSED
    return 0 if any(arm.fits >= question.concurrency for arm in able) else TOO_MANY


def _question(arguments: argparse.Namespace) -> Question:
    from vllm_sparse.kv.host.memory import available_bytes
    from vllm_sparse.planner.model import read_model
    from vllm_sparse.planner.plan import Question

    device = _device(arguments.device, arguments.bandwidth)
    model, context = read_model(arguments.model), arguments.context
    if context is None:
        furthest = model.furthest or _CONTEXT + arguments.output
        context = min(_CONTEXT, max(furthest - arguments.output, 1))
    for name in ("context", "concurrency", "tensor_parallel_size", "output", "block_size"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UnsupportedError(f"--{name.replace('_', '-')} must be at least 1")
    memory = arguments.device_memory or device.memory_gib
    pool = arguments.kv_memory or (None if memory else 4.0)
    host = arguments.host_memory
    return Question(
        replace(model, max_model_len=context + arguments.output),
        arguments.model,
        context,
        arguments.output,
        arguments.concurrency,
        device,
        int(memory * _GIB),
        available_bytes() if host is None else int(host * _GIB),
        arguments.tensor_parallel_size,
        kv_bytes=None if pool is None else int(pool * _GIB),
        block_size=arguments.block_size,
        settings=arguments.settings,
    )


def _device(kind: str, bandwidth: float | None) -> Device:
    """A kind of device, with a bandwidth in GB/s if that was measured."""
    device = DEVICES[kind]
    if bandwidth is None:
        return device
    if not bandwidth > 0:
        raise UnsupportedError("--bandwidth must be more than 0 GB/s")
    measured = bandwidth * 1e9
    link = device.link_bytes_per_s if device.launch_us else measured  # a CPU has one memory
    return device._replace(bytes_per_s=measured, link_bytes_per_s=link)


def _machine() -> dict[str, Any]:
    """What this machine has installed and would run, whatever is planned for."""
    from vllm_sparse.machine.kernels import summary
    from vllm_sparse.machine.versions import serving

    return {"versions": serving(), "kernels": summary()}


def _here(versions: dict[str, str | None], kernels: str) -> str:
    shown = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items())
    return f"this machine: {shown}\n  kernels: {kernels}; `vllm-sparse doctor` says more"


def _text(arm: Arm, question: Question) -> str:
    if arm.refused:
        return f"{arm.name}: refused\n  " + "\n  ".join(arm.refused)
    part = " (compressed keys and a step's frames)" if arm.slab_bytes else ""
    lines = [
        f"{arm.name}: {arm.kept}",
        f"  a request: {arm.request_bytes / _GIB:.3f} GiB on the device{part}, "
        f"{arm.request_blocks} blocks ({arm.prompt_blocks} while its prompt is read)",
        f"  pool: {arm.pool_blocks} blocks, {arm.pool_bytes / _GIB:.2f} GiB on the device; "
        f"{arm.fits} requests at once",
    ]
    beside = f"; not in it: {arm.left_out}" if arm.left_out else ""
    lines.append(f"  decode step of {question.concurrency}: at least {arm.step_ms:.2f} ms, "
                 f"{arm.speedup:.2f}x dense (estimate{beside})")  # fmt: skip
    if arm.slab_bytes:
        slab = f"slab {arm.slab_bytes / _GIB:.2f} GiB"
        lines.insert(2, f"  host pool {arm.host_bytes / _GIB:.2f} GiB, {slab}" if arm.host_bytes
                     else f"  {slab}: {ALL_FRAMES}")  # fmt: skip
    if arm.name != "dense":
        first = arm.wins_from
        lines.append("  never faster than dense" if first is None else
                     f"  faster than dense from {first} prompt tokens")  # fmt: skip
    return "\n".join([*lines, f"  {arm.serve}"])
