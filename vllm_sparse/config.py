# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Settings, read from vLLM's ``additional_config["vllm_sparse"]`` in every process.

``--additional-config '{"vllm_sparse": {"token_budget": 512}}'`` on the command line, or a preset or
file with ``{"vllm_sparse": {"config": "llama-3.1-8b"}}``; keys given beside ``config`` override it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vllm_sparse.errors import ConfigError
from vllm_sparse.registry import settings_class

NAMESPACE = "vllm_sparse"


class CommonSettings(BaseModel):
    """Settings of every backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: str = Field("", description="The backend's name in small letters; may be left out.")
    kernels: Literal["auto", "triton"] = Field(
        "auto",
        description="auto: C++ on a CPU, Triton on a GPU. triton on a CPU takes the GPU's path in "
        "Triton's interpreter, for tests.",
    )


class SpardaSettings(CommonSettings):
    """Settings of the SPARDA backend; defaults are those of MiniCPM4.1."""

    algorithm: Literal["sparda"] = "sparda"
    selector: Literal["forecast", "query", "lookahead-query", "previous"] | None = Field(
        None,
        description="What chooses the blocks of a layer. forecast: trained weights, a layer ahead. "
        "lookahead-query: the layer's query projection on the input of the layer before. query: "
        "its own queries (InfLLM-v2, nothing is fetched ahead). previous: the last token's "
        "queries. Unset: forecast with a forecast file, else previous (with sparse_prefill, "
        "lookahead-query).",
    )
    forecast: str | None = Field(None, description="safetensors file with Forecast weights.")
    block_size: PositiveInt = Field(64, description="Tokens per block; becomes vLLM's block size.")
    kernel_stride: PositiveInt = Field(
        16, description="Tokens between compressed keys, each the mean of twice as many tokens."
    )
    init_blocks: PositiveInt = Field(1, description="Blocks at the start that are always read.")
    local_blocks: PositiveInt = Field(
        32, description="Blocks before the current one that are always read."
    )
    top_k: PositiveInt | None = Field(
        None, description="Blocks read in total. Unset: local_blocks + top_k_extra."
    )
    top_k_extra: PositiveInt | None = Field(
        None,
        description="Blocks read beside local_blocks, the meaning that 'topk' has in MiniCPM4 "
        "checkpoints. Unset, as is top_k: 64.",
    )
    dense_len: int = Field(
        8192, ge=0, description="Tokens that see at most this many are attended densely."
    )
    sparse_prefill: bool | PositiveInt = Field(
        False,
        description="Attend sparsely in prompts too, for models trained that way. A number: the "
        "blocks that prompt tokens read in total, instead of those of generated ones.",
    )
    host_gib: float = Field(4.0, gt=0, description="Host memory for keys and values, per rank.")
    slab_gib: float | None = Field(
        None,
        gt=0,
        description="Device memory for hot blocks, per rank. Unset: twice the working set of a "
        "step, at most all blocks.",
    )
    staging_blocks: PositiveInt = Field(
        32, description="Blocks per half of the double buffer that streams prompts back."
    )
    resident: bool = Field(False, description="Keep every block on the device; nothing is fetched.")
    resident_first_layer: bool = Field(
        False, description="Keep layer 0 on the device, whose selection cannot look ahead."
    )
    prefetch: bool = Field(
        True, description="Fetch a layer ahead; off: select ahead, fetch when the layer runs."
    )
    link_gb_per_s: float | None = Field(
        None, gt=0, description="Slow the CPU's copy engine to this rate, to study overlap."
    )
    poison: bool = Field(
        False, description="Fill frames and host blocks with NaN until written, for debugging."
    )

    @property
    def blocks_read(self) -> int:
        """Blocks read per KV head and token in total."""
        if self.top_k is not None:
            return self.top_k
        return self.local_blocks + (self.top_k_extra or 64)

    @property
    def prompt_blocks_read(self) -> int:
        """Blocks read per KV head and token of a sparse prompt in total."""
        own = self.sparse_prefill
        return self.blocks_read if isinstance(own, bool) else own

    @property
    def prompts_like_outputs(self) -> bool:
        """Whether a token reads the same blocks in a prompt as in an output."""
        return bool(self.sparse_prefill) and self.prompt_blocks_read == self.blocks_read

    @property
    def chosen_selector(self) -> str:
        """The selector in force."""
        if self.selector or self.forecast:
            return self.selector or "forecast"
        return "lookahead-query" if self.sparse_prefill else "previous"

    @model_validator(mode="after")
    def _consistent(self) -> SpardaSettings:
        if self.top_k is not None and self.top_k_extra is not None:
            raise ValueError("top_k and top_k_extra say the same in two ways; give one of them")
        forced = self.init_blocks + self.local_blocks + 1
        for name, read in (
            ("top_k", self.blocks_read),
            ("sparse_prefill", self.prompt_blocks_read),
        ):
            if read < forced:
                raise ValueError(
                    f"{name}={read} is less than the {forced} blocks that are always read "
                    f"(init_blocks={self.init_blocks}, local_blocks={self.local_blocks}, the "
                    f"current one); raise {name} or lower local_blocks"
                )
        if self.block_size % (2 * self.kernel_stride):
            raise ValueError(
                f"block_size={self.block_size} is not a multiple of two kernel_stride="
                f"{self.kernel_stride}"
            )
        if self.chosen_selector == "forecast" and not self.forecast:
            raise ValueError(
                "selector=forecast needs trained weights: set forecast to a safetensors file, or "
                "choose selector lookahead-query, query or previous"
            )
        if self.forecast and self.chosen_selector != "forecast":
            raise ValueError(f"a forecast file is given but selector={self.selector} ignores it")
        if self.sparse_prefill and self.chosen_selector == "previous":
            raise ValueError(
                "sparse_prefill needs a selector that looks at each token; previous reuses the "
                "last token's choice"
            )
        if self.resident and (self.slab_gib is not None or self.resident_first_layer):
            raise ValueError(
                "resident keeps every block on the device, so slab_gib and resident_first_layer "
                "have no meaning with it"
            )
        return self


def preset_names() -> list[str]:
    """Names of the presets shipped in ``configs/``."""
    folder = resources.files("vllm_sparse.configs")
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def _read_preset(name: str) -> dict[str, Any]:
    if name in preset_names():
        text = resources.files("vllm_sparse.configs").joinpath(f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise ConfigError(
            f"{NAMESPACE}.config: {name!r} is neither a file nor a preset. "
            f"Presets: {', '.join(preset_names())}"
        )
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ConfigError(f"{NAMESPACE}.config: {name!r} must hold a mapping of settings")
    return values


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
        values = {**_read_preset(str(preset)), **values}
    chosen = values.setdefault("algorithm", algorithm)
    if chosen != algorithm:
        raise ConfigError(
            f"{NAMESPACE}.algorithm: {chosen!r} does not belong to the chosen attention backend, "
            f"which is {algorithm!r}. Change --attention-backend or the setting"
        )
    kind = settings_class(algorithm)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join([NAMESPACE, *(str(part) for part in item["loc"])])
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                known = ", ".join(kind.model_fields)
                message = f"unknown setting; known are: {known}"
            lines.append(f"{key}: {message} (got {item['input']!r})")
        raise ConfigError("; ".join(lines)) from None
