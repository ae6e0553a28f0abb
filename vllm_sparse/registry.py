# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The only place that knows names: what ``--attention-backend`` may be, and what stands behind it.

A policy of another package registers itself under the entry-point group ``vllm_sparse.policies``,
its name in capitals: ``MYPOLICY = "my_package.module:MyPolicy"``. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from vllm_sparse.config import CommonSettings

ENTRY_POINTS = "vllm_sparse.policies"


class Entry(NamedTuple):
    """One name.

    Attributes:
        settings: The settings class, or a policy that has one.
        cpu: vLLM backend on CPUs.
        gpu: vLLM backend on GPUs, and on CPUs where kernels are interpreted.
    """

    settings: str
    cpu: str = "vllm_sparse.backends.policy_cpu:PolicyCpuBackend"
    gpu: str = "vllm_sparse.backends.policy_gpu:PolicyGpuBackend"


_BUILT_IN = {
    "ROCKETKV": Entry("vllm_sparse.policies.rocketkv:RocketKV"),
    "QUEST": Entry("vllm_sparse.policies.quest:Quest"),
    "SNAPKV": Entry("vllm_sparse.policies.snapkv:SnapKV"),
    "STREAMINGLLM": Entry("vllm_sparse.policies.streamingllm:StreamingLLM"),
    "SPARDA": Entry(
        "vllm_sparse.config:SpardaSettings",
        cpu="vllm_sparse.backends.sparda_cpu:SpardaCpuBackend",
        gpu="vllm_sparse.backends.sparda_gpu:SpardaGpuBackend",
    ),
}


@cache
def entries() -> dict[str, Entry]:
    """Every name, those of other packages included.

    Raises:
        ConfigError: Another package claims a name of ours, or one that is not in capitals.
    """
    found = dict(_BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found or point.name != point.name.upper():
            raise ConfigError(
                f"the entry point {point.name!r} = {point.value!r} in {ENTRY_POINTS!r} "
                f"{'is taken' if point.name in found else 'is not in capitals'}; its package must "
                "choose another name"
            )
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
