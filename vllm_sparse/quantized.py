# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How many bytes a stored weight takes, by what its checkpoint says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Bits of a number by the name of a method or an algorithm, scales included where few share one.
_BITS = {
    **dict.fromkeys(
        ("fp8", "fbgemm_fp8", "modelopt", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel",
         "fp8_pb_wo", "fp8_per_channel_per_token", "int8_per_channel_weight_only",
         "experts_int8"), 8.0,
    ),
    **dict.fromkeys(("mxfp8", "modelopt_mxfp8"), 8.25),
    **dict.fromkeys(("mxfp4", "gpt_oss_mxfp4"), 4.25),
    **dict.fromkeys(("nvfp4", "modelopt_fp4", "nvfp4_per_token", "w4a16_nvfp4"), 4.5),
}  # fmt: skip
_EXPERTS_ONLY = ("mxfp4", "gpt_oss_mxfp4", "experts_int8")
_SECTIONS = ("quantization_config", "compression_config")
_PLAIN_BITS = 16


class ItemBytes(NamedTuple):
    """Bytes of a number: of attention's matrices, and of those of the MLP or of its experts.

    Embeddings, the head and norms stay in the model's dtype.
    """

    attention: float
    mlp: float


def item_bytes(model: Any, of_groups: Callable[..., float] = max) -> ItemBytes | None:
    """What matrices are stored in; ``None``: quantised, and nobody knows to how many bits.

    Args:
        model: vLLM's model configuration.
        of_groups: Which group of matrices stands for all, if they are stored in several ways.
    """
    plain, method = model.dtype.itemsize, getattr(model, "quantization", None)
    if not method:
        return ItemBytes(plain, plain)
    bits = weight_bits(method, described(model), of_groups)
    if bits is None:
        return None
    return ItemBytes(plain if method in _EXPERTS_ONLY else bits / 8, bits / 8)


def described(model: Any) -> Mapping[str, Any]:
    """What a checkpoint says of its quantisation; empty if it was not stored so.

    Args:
        model: vLLM's model configuration.
    """
    parts = (getattr(model, "hf_config", None), model.hf_text_config)
    found = (getattr(part, key, None) for part in parts for key in _SECTIONS)
    return next(filter(None, found), {})


def weight_bits(
    method: str, given: Mapping[str, Any], of_groups: Callable[..., float] = max
) -> float | None:
    """Bits of a number in a quantised matrix, scales included; ``None``: nobody knows.

    Args:
        method: vLLM's name of it.
        given: The checkpoint's ``quantization_config``, as far as there is one.
        of_groups: Which group of matrices stands for all, if they are stored in several ways.
    """
    if groups := given.get("config_groups"):  # compressed-tensors, ModelOpt
        # Those of activations or caches alone have no weights.
        found = [group["weights"] for group in groups.values() if group.get("weights")]
        return of_groups(map(_of_group, found), default=_PLAIN_BITS)
    if bits := given.get("bits") or given.get("w_bit"):  # GPTQ, AWQ, AutoRound
        return _with_scales(bits, given.get("group_size") or given.get("q_group_size"), 16)
    if given.get("load_in_4bit"):  # bitsandbytes: a scale of 32 bits for 64 numbers
        return 4.5
    if given.get("load_in_8bit"):
        return 8.0
    algorithm = str(given.get("quant_algo") or "").lower()
    return _BITS.get(algorithm or method)


def _of_group(weights: Mapping[str, Any]) -> float:
    scale = 8 if weights.get("type") == "float" else 16
    return _with_scales(weights.get("num_bits") or _PLAIN_BITS, weights.get("group_size"), scale)


def _with_scales(bits: float, group: int | None, scale_bits: int) -> float:
    """Of groups along a row; a scale for a whole row or block counts for nothing."""
    return bits + (scale_bits / group if group and group > 0 else 0)
