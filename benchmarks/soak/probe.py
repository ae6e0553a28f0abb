# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Looks into vLLM's worker process: `--worker-extension-cls benchmarks.soak.probe.Probe`.

Called through `/collective_rpc`, which vLLM serves with `VLLM_SERVER_DEV_MODE=1`.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

NAME = "benchmarks.soak.probe.Probe"


class Probe:
    """Becomes a base class of vLLM's worker."""

    def soak_look(self) -> dict[str, Any]:
        """What the worker holds between steps.

        Returns:
            ``requests`` that its runner knows; ``tensors`` and ``tensor_bytes`` that are alive;
            ``threads`` of Python by name; and for SPARDA ``host_bytes``, ``frames`` in use, and
            ``broken``: what its page tables have wrong, or an empty text.
        """
        import torch

        from benchmarks import live

        gc.collect()
        # By type: some objects lie about their class, and some tensors have no memory.
        kinds = torch.Tensor, torch.nn.Parameter
        tensors = [x for x in gc.get_objects() if type(x) in kinds]
        storages = {
            storage.data_ptr(): storage.nbytes()
            for storage in (x.untyped_storage() for x in tensors if x.device.type != "meta")
        }
        found: dict[str, Any] = {
            "requests": len(self.model_runner.requests),  # type: ignore[attr-defined]
            "tensors": len(tensors),
            "tensor_bytes": sum(storages.values()),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "broken": "",
        }
        try:
            pager = live.sparda_runtime(self).pager
        except AttributeError:  # a policy: blocks are vLLM's
            return found
        found["host_bytes"], found["frames"] = pager.host.nbytes, pager.frames_in_use()
        try:
            live.check_integrity(self)
        except Exception as error:
            found["broken"] = f"{type(error).__name__}: {error}"
        return found
