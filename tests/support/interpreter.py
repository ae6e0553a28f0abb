# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Triton's interpreter without its most expensive habit, and with a GPU's rounding to fp8."""

from __future__ import annotations

import functools
from typing import Any

import torch


def patch_language_once_per_launch() -> None:
    """Spare calls between kernels what their launch has done already.

    The interpreter puts its own functions into Triton's language when a kernel is launched, and
    again whenever one jitted function calls another, which takes a third of a launch's time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, ...]] = set()

    @functools.cache
    def languages(function: Any) -> tuple[bool, ...]:
        names = list(function.__globals__.values())
        return tuple(
            any(value is module for value in names) for module in (language, language.core)
        )

    def patch_once(function: Any) -> Any:
        key = languages(function)
        if key not in patched:
            patched.add(key)
            return patch(function)
        return None

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


def round_to_fp8_as_gpus_do() -> None:
    """To the nearest e4m3 number; the interpreter loses carries and subnormal numbers."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if target == language.float8e4nv and source == language.float32:
            numbers = torch.from_numpy(data.view("float32").copy())
            return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded
