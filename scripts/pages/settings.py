# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A table of every backend's settings, from the classes that check them."""

from __future__ import annotations

from functools import partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import annotated_types

from benchmarks.tables import table
from vllm_sparse.config import CommonSettings
from vllm_sparse.features import OUTSIDE
from vllm_sparse.registry import entries, settings_class

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

BACKENDS = tuple(name.lower() for name, entry in entries().items() if entry.family != OUTSIDE)
_NAMES = {int: "integer", float: "number", str: "text"}
_BOUNDS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


def spelt(value: Any) -> str:
    """A value as JSON spells it; nothing if it is unset."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, str):
        return value
    return str(list(value) if isinstance(value, tuple) else value).lower()


def allowed(field: FieldInfo) -> str:
    """Kinds and ranges of values, in words."""
    bounds = [part for part in field.metadata if type(part) in _BOUNDS]
    return " or ".join(dict.fromkeys(_kinds(field.annotation, bounds)))


def _kinds(kind: Any, bounds: list[Any]) -> list[str]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [text for part in parts if part is not NoneType for text in _kinds(part, bounds)]
    if origin is Literal:
        return [", ".join(f"`{spelt(part)}`" for part in parts)]
    if origin is tuple:
        return [_kinds(parts[0], [])[0].replace("integer", "list of integers")]
    if hasattr(kind, "__metadata__"):
        own = [part for part in kind.__metadata__ if type(part) in _BOUNDS]
        return _kinds(kind.__origin__, [*bounds, *own])
    if kind is bool:
        return ["`true`, `false`"]
    return [" ".join((_NAMES[kind], *map(_limit, bounds)))]


def _limit(bound: Any) -> str:
    key, sign = _BOUNDS[type(bound)]
    return f"{sign} {getattr(bound, key):g}"


def settings(backend: str) -> str:
    """The table of a backend, which is named in small letters."""
    fields = settings_class(backend).model_fields
    columns = {
        "key": lambda name: f"`{name}`",
        "default": lambda name: spelt(fields[name].default),
        "allowed": lambda name: allowed(fields[name]),
        "meaning": lambda name: fields[name].description,
    }
    # What every backend has stands last.
    names = sorted(fields, key=lambda name: name in CommonSettings.model_fields)
    return table([name for name in names if name != "algorithm"], columns)


TABLES = {f"settings-{name}": partial(settings, name) for name in BACKENDS}
