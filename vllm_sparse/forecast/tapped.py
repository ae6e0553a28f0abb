# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Model classes with taps, made when vLLM asks for them: ``SpardaLlamaForCausalLM`` and so on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models import ModelRegistry

from vllm_sparse.forecast.install import install_taps
from vllm_sparse.forecast.routing import ARCHITECTURES, PREFIX

if TYPE_CHECKING:
    from torch import nn


def __getattr__(name: str) -> type[nn.Module]:
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _tapped_model(architecture)


@functools.cache
def _tapped_model(architecture: str) -> type[nn.Module]:
    # What the registry has under the name, which another plugin may have replaced.
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    class Tapped(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self.__dict__["forecast_taps"] = install_taps(self, vllm_config)

        def process_weights_after_loading(self) -> None:
            inherited = getattr(super(), "process_weights_after_loading", None)
            if inherited is not None:
                inherited()
            self.forecast_taps.finish()

    Tapped.__name__ = Tapped.__qualname__ = PREFIX + architecture
    Tapped.__doc__ = f"{architecture} with taps."
    return Tapped
