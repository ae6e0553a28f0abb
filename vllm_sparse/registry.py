# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The only place that knows names: what ``--attention-backend`` may be, and what stands behind it.

A policy of another package registers itself under the entry-point group ``vllm_sparse.policies``,
its name in capitals: ``MYPOLICY = "my_package.module:MyPolicy"``. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_sparse.features import OUTSIDE, POLICIES, SPARDA

if TYPE_CHECKING:
    from vllm_sparse.config import CommonSettings

ENTRY_POINTS = "vllm_sparse.policies"

# A child of vLLM's logger: others have no handler in its processes.
logger = logging.getLogger("vllm.sparse")


class Entry(NamedTuple):
    """One name.

    Attributes:
        settings: The settings class, or a policy that has one.
        cpu: vLLM backend on CPUs.
        gpu: vLLM backend on GPUs, and on CPUs where kernels are interpreted.
        family: Whose cells of :data:`vllm_sparse.features.FEATURES` say what it serves.
        preset: Settings with which the demo's model is served; ``plan`` and ``demo`` show what has
            one if nobody chooses, the others are there for comparisons.
        prepare: Called at start-up with vLLM's configuration, which it completes, the settings, and
            what tells the memory of a device, or ``None``.
    """

    settings: str
    cpu: str = "vllm_sparse.backends.policy_cpu:PolicyCpuBackend"
    gpu: str = "vllm_sparse.backends.policy_gpu:PolicyGpuBackend"
    family: str = OUTSIDE
    preset: str = ""
    prepare: str = ""


_BUILT_IN = {
    "ROCKETKV": Entry(
        "vllm_sparse.policies.rocketkv:RocketKV", family=POLICIES, preset="smollm2-135m"
    ),
    "QUEST": Entry("vllm_sparse.policies.quest:Quest", family=POLICIES),
    "SNAPKV": Entry("vllm_sparse.policies.snapkv:SnapKV", family=POLICIES),
    "STREAMINGLLM": Entry("vllm_sparse.policies.streamingllm:StreamingLLM", family=POLICIES),
    "SPARDA": Entry(
        "vllm_sparse.policies.sparda:SpardaSettings",
        cpu="vllm_sparse.backends.sparda_cpu:SpardaCpuBackend",
        gpu="vllm_sparse.backends.sparda_gpu:SpardaGpuBackend",
        family=SPARDA,
        preset="smollm2-135m-sparda",
        prepare="vllm_sparse.startup:prepare_sparda",
    ),
}


@cache
def entries() -> dict[str, Entry]:
    """Every name, those of other packages included.

    A name that is taken, or not in capitals, is left out with a warning: who chose another backend
    must not be stopped by it.
    """
    found = dict(_BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found or point.name != point.name.upper():
            logger.warning(
                "The entry point %s = %s in %s %s, so it is ignored; its package must choose "
                "another name",
                point.name,
                point.value,
                ENTRY_POINTS,
                "is taken" if point.name in found else "is not in capitals",
            )
            continue
        found[point.name] = Entry(point.value)
    return found


def backend_path(name: str) -> str:
    """Where vLLM finds the backend of a name; which class that is depends on the platform."""
    return f"vllm_sparse.backends.{name}"


def is_ours(backend: Any) -> bool:
    """Whether a member of vLLM's backend enum (or ``None``) is one of our names."""
    return backend is not None and backend.name in entries()


def load(reference: str) -> Any:
    """What ``module:name`` stands for."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def policy(name: str) -> Any:
    """The policy class behind a name in capitals; ``None`` if it is no :class:`Policy`."""
    found = load(entries()[name].settings)
    return found if hasattr(found, "Settings") else None


def settings_class(algorithm: str) -> type[CommonSettings]:
    """The settings class behind a name, in small letters as settings spell it."""
    found = load(entries()[algorithm.upper()].settings)
    kind: type[CommonSettings] = getattr(found, "Settings", found)
    return kind
