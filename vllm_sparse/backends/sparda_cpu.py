# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA on CPUs: host and device are two pools in one memory, a thread copies between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_sparse.backends.sparda import SpardaBackend, SpardaBuilder
from vllm_sparse.backends.sparda_setup import Machine
from vllm_sparse.kernels.dispatch import sparda_kernels
from vllm_sparse.prefetch.lane import ThreadLane

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from vllm_sparse.kv.host.geometry import Geometry
    from vllm_sparse.policies.sparda import SpardaSettings


class SpardaCpuBackend(SpardaBackend, CPUAttentionBackend):
    """SPARDA on CPUs."""

    @staticmethod
    def get_builder_cls() -> type[SpardaCpuBuilder]:
        """The metadata builder."""
        return SpardaCpuBuilder


class SpardaCpuBuilder(SpardaBuilder):
    """For CPUs."""

    @staticmethod
    def machine(
        config: VllmConfig, settings: SpardaSettings, geometry: Geometry, device: torch.device
    ) -> Machine:
        """Two pools in one memory, and a thread that copies between them."""
        lane = ThreadLane(settings.link_gb_per_s)
        return Machine(sparda_kernels(device), lane, captured=False, truncates=True)
