# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""vLLM's CUDA platform, worker and graphs on a GPU that is only pretended.

From vLLM's build for CPUs: its operators of the same names stand for those of a GPU, FlashAttention
is PyTorch under the real one's signature. What operators vLLM writes in Python are called directly,
or a capture would not see what they launch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from support import pretend_gpu, stand_ins

if TYPE_CHECKING:
    from collections.abc import Callable


def install(breakable: str) -> None:
    """Before anything of vLLM is imported, and after `pretend_gpu.install`.

    Args:
        breakable: Variable that has vLLM capture pieces of graphs without its compiler.
    """
    for name in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):
        sys.modules[name] = ModuleType(name)
    platforms = importlib.import_module("vllm.platforms")
    platforms.vllm_version_matches_substr = lambda _: False
    stock = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    cuda = importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform

    class Pretended(cuda):  # type: ignore[misc]
        dispatch_key, dist_backend = "CPU", "gloo"

        @classmethod
        def opaque_attention_op(cls) -> bool:
            return False

        @classmethod
        def import_kernels(cls) -> None:
            stock.import_kernels()

    platforms._current_platform = Pretended()
    Pretended.import_kernels()
    torch.ops._C.get_cuda_view_from_cpu_tensor = pretend_gpu.view_of_host
    torch.ops._C.weak_ref_tensor = lambda tensor: tensor
    _call_directly()
    _flash_attention(Path(platforms.__file__).parents[1])
    _break_graphs(breakable)
    # Of kernels that nobody here has.
    warmup: Any = importlib.import_module("vllm.model_executor.warmup.kernel_warmup")
    warmup.kernel_warmup = lambda _: None
    # Kernels of vLLM that Triton's interpreter cannot run.
    cuts: Any = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    cuts.apply_top_k_top_p_triton = lambda logits, *_, **__: logits
    grammars: Any = importlib.import_module("vllm.v1.worker.gpu.structured_outputs")
    grammars.StructuredOutputsWorker.apply_grammar_bitmask = lambda *_: None


def _call_directly() -> None:
    """Python operators are what they were made of."""
    utils: Any = importlib.import_module("vllm.utils.torch_utils")
    register = utils.direct_register_custom_op

    def keep(op_name: str, op_func: Any, *args: Any, **kwargs: Any) -> None:
        register(op_name, op_func, *args, **kwargs)
        setattr(torch.ops.vllm, op_name, op_func)

    utils.direct_register_custom_op = keep


def _break_graphs(variable: str) -> None:
    """Attention ends a piece of a graph, in every process: only who captures pieces is told."""
    asked = os.environ.get(variable, "0")
    os.environ[variable] = "1"
    importlib.import_module("vllm.model_executor.layers.attention.attention")
    os.environ[variable] = asked


def _flash_attention(package: Path) -> None:
    """FlashAttention 3 and its cache write."""
    name = "vllm.vllm_flash_attn"
    file = package / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location(f"{name}.flash_attn_interface", file)
    assert spec is not None
    assert spec.loader is not None
    interface: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interface)
    attend = _same_arguments(interface.flash_attn_varlen_func, stand_ins.attend)
    interface.flash_attn_varlen_func = attend
    interface.get_scheduler_metadata = _same_arguments(interface.get_scheduler_metadata, _planned)
    interface.is_fa_version_supported = lambda version: version == 3
    sys.modules[name] = sys.modules[spec.name] = interface
    ops: Any = importlib.import_module("vllm._custom_ops")
    for name in dir(ops):
        if "_supports_" in name:
            setattr(ops, name, lambda *_: False)
    ops.reshape_and_cache_flash = _same_arguments(ops.reshape_and_cache_flash, stand_ins.write)


def _planned(*, batch_size: int, cache_seqlens: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.zeros(batch_size + 1, dtype=torch.int32, device=cache_seqlens.device)


def _same_arguments(real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in that refuses what the real function would."""
    signature, launched = inspect.signature(real), pretend_gpu.kernel(ours)
    named = any(
        item.kind == item.KEYWORD_ONLY for item in inspect.signature(ours).parameters.values()
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        return launched(**bound.arguments) if named else launched(*args, **kwargs)

    return call
