# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The GPU host: what it is, and which copy of the plugin its programs import."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).resolve().parents[2]
SITE = Path("/tmp/site")
_PR_SET_PDEATHSIG = 1
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine advances only when it is told to
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # Optional parts of vLLM, which a small installation lacks; both sides do without.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    # One rank talks to itself, on machines without a network, too.
    "VLLM_HOST_IP": "127.0.0.1",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}
INSTALLED_AS = {
    "vllm_sparse": "vllm_sparse",
    "kernels": "vllm_sparse/kernels",
    "configs": "vllm_sparse/configs",
}
_QUERY = {
    "name": "name", "driver": "driver_version", "memory_mib": "memory.total",
    "pcie_generation": "pcie.link.gen.current", "pcie_width": "pcie.link.width.current",
    "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
}  # fmt: skip


def end_with_parent() -> None:
    """Has this process killed when the one that started it ends in whatever way.

    An engine that nobody waits for would keep the GPU's memory from the next try.
    """
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def default_site() -> Path:
    """The first folder of PYTHONPATH that holds vLLM, else the usual one."""
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if entry and (Path(entry) / "vllm").is_dir():
            return Path(entry)
    return SITE


def install_command(site: Path) -> str:
    """What to run to install this checkout beside vLLM, without a network.

    The wheel that came along, of which nothing has to be built; else what builds it must be there.
    """
    install, target = "python3 -m pip install --no-index --no-deps", f"--upgrade --target {site}"
    wheels = sorted((ROOT / "dist").glob("vllm_sparse-*.whl"))
    if wheels:
        return f"{install} {target} {wheels[-1]}"
    return f"PYTHONPATH={site} {install} --no-build-isolation {target} {ROOT}"


def child_paths(scratch: Path) -> str:
    """PYTHONPATH for the stages: everything but the checkout, whose benchmarks come by a link.

    With the checkout itself on the path, its ``vllm_sparse`` would hide the installed one and have
    no kernels, which lie elsewhere in the repository.
    """
    links = scratch / "path"
    links.mkdir()
    for name in ("benchmarks", "tests"):
        (links / name).symlink_to(ROOT / name, target_is_directory=True)
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in entries if entry and Path(entry).resolve() != ROOT]
    return os.pathsep.join([str(links), *kept])


def stale_files(package: Path) -> list[str]:
    """Files of the checkout that differ from the installed plugin, or are missing there.

    Args:
        package: The installed ``vllm_sparse`` folder.
    """
    stale = []
    for folder, target in INSTALLED_AS.items():
        destination = package.parent / target
        for source in sorted((ROOT / folder).rglob("*")):
            if source.suffix not in (".py", ".yaml", ".cpp", ".h"):
                continue
            # In an editable install the other two folders stay where they are.
            installed = destination / source.relative_to(ROOT / folder)
            if package != ROOT / "vllm_sparse" and (
                not installed.is_file() or installed.read_bytes() != source.read_bytes()
            ):
                stale.append(str(source.relative_to(ROOT)))
    return stale


def facts() -> dict:
    """GPU and versions for a result file; nothing is imported for it."""
    versions = results.versions(("triton", "flashinfer-python", "nvidia-cuda-runtime"))
    return {"gpu": gpu(), "gpu_versions": versions}


def gpu() -> dict | None:
    """Name, driver and present clocks of the GPU; None without one."""
    text = _output(
        "nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits"
    )
    if not text:
        return None
    values = [value.strip() for value in text.splitlines()[0].split(",")]
    return dict(zip(_QUERY, values, strict=False))


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
