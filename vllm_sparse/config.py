# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Settings, read from vLLM's ``additional_config["vllm_sparse"]`` in every process.

``--additional-config '{"vllm_sparse": {"token_budget": 512}}'`` on the command line, or a preset or
file with ``{"vllm_sparse": {"config": "llama-3.1-8b"}}``; keys given beside ``config`` override it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_sparse.errors import ConfigError
from vllm_sparse.registry import settings_class

if TYPE_CHECKING:
    from vllm_sparse.policies.rocketkv import RocketKVSettings as RocketKVSettings
    from vllm_sparse.policies.sparda import SpardaSettings as SpardaSettings

NAMESPACE = "vllm_sparse"
PRESETS = "vllm_sparse.configs"

_LIMIT = 1 << 31
_MOVED = {"RocketKVSettings": "rocketkv", "SpardaSettings": "sparda"}

Settings = TypeVar("Settings", bound=BaseModel)


class CommonSettings(BaseModel):
    """Settings of every backend."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    algorithm: str = Field("", description="The backend's name in small letters; may be left out.")
    kernels: Literal["auto", "triton"] = Field(
        "auto",
        description="`auto`: C++ on a CPU, Triton on a GPU. `triton` on a CPU takes the GPU's path "
        "in Triton's interpreter, for tests.",
    )
    allow_dense: bool = Field(
        True,
        description="Let requests ask to read everything (`vllm_sparse.sparse: false`). Off where "
        "clients are not trusted: each such step reads a whole context, SPARDA's from host memory.",
    )

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Kernels count in 32 bits, and would go on with what is left of a larger number."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not -_LIMIT < number < _LIMIT:
                raise ValueError(f"{number} is beyond what kernels can count; stay below {_LIMIT}")
        return value


def __getattr__(name: str) -> Any:
    """Settings that once were defined here."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = settings_class(_MOVED[name])
    warnings.warn(
        f"{__name__}.{name} is now {kind.__module__}.{name}; import it from there",
        DeprecationWarning,
        stacklevel=2,
    )
    return kind


def shipped_names(package: str) -> list[str]:
    """Names of the YAML files that a package ships."""
    files = [item.name for item in resources.files(package).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def read_values(key: str, name: str, package: str, kind: str) -> dict[str, Any]:
    """Settings that are shipped under a name, or stand in a file.

    Args:
        key: What was set to ``name``, for messages.
        name: Of a YAML file of ``package``, or a path.
        package: Ships some.
        kind: What they are called, in the singular.

    Raises:
        ConfigError: There are none, or it is no mapping.
    """
    try:
        if name in shipped_names(package):
            text = resources.files(package).joinpath(f"{name}.yaml").read_text()
        elif Path(name).is_file():
            text = Path(name).read_text()
        else:
            raise ConfigError(
                f"{key}: {name!r} is neither a file nor a {kind}. "
                f"{kind.capitalize()}s: {', '.join(shipped_names(package))}"
            )
        values = yaml.safe_load(text)
    except (OSError, UnicodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{key}: {name!r} is no readable YAML file of settings: {reason}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {name!r} must hold a mapping of settings")
    return values


def validated(kind: type[Settings], values: dict[str, Any], *prefix: str) -> Settings:
    """Settings made of values.

    Args:
        kind: Their class.
        values: What was set.
        *prefix: Where, for messages.

    Raises:
        ConfigError: Unknown key, wrong type or contradictory values; the message names the key.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join([*prefix, *(str(part) for part in item["loc"])])
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                known = ", ".join(kind.model_fields)
                message = f"unknown setting; known are: {known}"
            lines.append(f"{key}: {message} (got {item['input']!r})")
        raise ConfigError("; ".join(lines)) from None


def load_settings(additional_config: Any, algorithm: str) -> Any:
    """Validate the user's settings for one backend.

    Args:
        additional_config: vLLM's ``additional_config``; settings are under ``vllm_sparse``.
        algorithm: What the chosen backend implements, in small letters: ``"rocketkv"``.

    Returns:
        Frozen settings, of the class that the registry names for ``algorithm``.

    Raises:
        ConfigError: Unknown key, wrong type, contradictory values, unknown preset, or settings
            for another algorithm; the message names the key.
    """
    if isinstance(additional_config, str | int | float | list):  # what JSON can be beside
        raise ConfigError(
            f"--additional-config: expected a mapping such as {{{NAMESPACE!r}: {{...}}}}, got "
            f"{additional_config!r}"
        )
    section = {}
    if isinstance(additional_config, Mapping):
        section = additional_config.get(NAMESPACE, {})
        misspelt = [k for k in additional_config if k.replace("-", "_") == NAMESPACE != k]
        if misspelt:
            raise ConfigError(f"additional_config key {misspelt[0]!r} should be {NAMESPACE!r}")
    if not isinstance(section, Mapping):
        raise ConfigError(f"{NAMESPACE}: expected a mapping of settings, got {section!r}")
    values = dict(section)
    preset = values.pop("config", None)
    if preset is not None:
        values = {**read_values(f"{NAMESPACE}.config", str(preset), PRESETS, "preset"), **values}
    chosen = values.setdefault("algorithm", algorithm)
    if chosen != algorithm:
        raise ConfigError(
            f"{NAMESPACE}.algorithm: {chosen!r} does not belong to the chosen attention backend, "
            f"which is {algorithm!r}. Change --attention-backend or the setting"
        )
    return validated(settings_class(algorithm), values, NAMESPACE)
