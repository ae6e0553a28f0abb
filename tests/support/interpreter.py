# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Triton's interpreter without its most expensive habits, and with a GPU's rounding to fp8."""

from __future__ import annotations

import functools
from typing import Any

import torch


def install() -> None:
    """Change the interpreter of this process; after `adversary.install`."""
    round_to_fp8_as_gpus_do()
    skip_what_nobody_sees()
    patch_language_once_per_launch()


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


def skip_what_nobody_sees() -> None:
    """Spare half of what the interpreter computes.

    It makes anew for every value its table of NumPy's types, shapes in Triton's own words and types
    of blocks; and it looks for overflows, of which it says nothing, as nothing is debugged.
    """
    from triton import language
    from triton.runtime import interpreter

    find, begin = interpreter._get_np_dtype, language.core.tensor.__init__
    describe = language.block_type.__init__
    types: dict[str, Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def find_once(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, language.block_type) else kind
        if element.name not in types:
            types[element.name] = find(element)
        return types[element.name]

    def begin_shaped(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            begin(self, handle, type)
            shapes[key] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[key]

    def describe_once(self: Any, element: Any, shape: Any) -> None:
        key = element.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            describe(self, element, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    interpreter._get_np_dtype = find_once
    language.block_type.__init__ = describe_once
    language.core.tensor.__init__ = begin_shaped


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
