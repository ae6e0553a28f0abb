# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA (arXiv 2606.04511): what can be set. Which blocks a token reads is in `windows`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from vllm_sparse.config import CommonSettings
from vllm_sparse.policies.windows import (
    block_scores,
    compress_keys,
    forecast_scores,
    num_windows,
    query_scores,
    select_blocks,
)

__all__ = [
    "SpardaSettings",
    "block_scores",
    "compress_keys",
    "forecast_scores",
    "num_windows",
    "query_scores",
    "select_blocks",
]


class SpardaSettings(CommonSettings):
    """Settings of the SPARDA backend; defaults are those of MiniCPM4.1."""

    algorithm: Literal["sparda"] = "sparda"
    selector: Literal["forecast", "query", "lookahead-query", "previous"] | None = Field(
        None,
        description="What chooses the blocks of a layer. `forecast`: trained weights, a layer "
        "ahead. `lookahead-query`: the layer's query projection on the input of the layer before. "
        "`query`: its own queries (InfLLM-v2); nothing can be fetched ahead. `previous`: the last "
        "token's queries. Unset: `forecast` with a forecast file, else `previous` (with "
        "`sparse_prefill`: `query`).",
    )
    forecast: str | None = Field(
        None,
        min_length=1,
        description="File with Forecast weights: safetensors, or an official PyTorch checkpoint as "
        "it is, also as sglang's pull requests #38302 and #38397 read it (nested, any prefix). "
        "Nothing in it is executed. `vllm-sparse convert-forecast` makes safetensors of one.",
    )
    block_size: PositiveInt = Field(64, description="Tokens per block; becomes vLLM's block size.")
    kernel_stride: PositiveInt = Field(
        16, description="Tokens between compressed keys, each the mean of twice as many tokens."
    )
    init_blocks: PositiveInt = Field(1, description="Blocks at the start that are always read.")
    local_blocks: PositiveInt = Field(
        32, description="Blocks before the current one that are always read."
    )
    top_k: PositiveInt | None = Field(
        None,
        description="Blocks read per KV head and token in total. Unset: `local_blocks` + "
        "`top_k_extra`, 96 with the defaults.",
    )
    top_k_extra: PositiveInt | None = Field(
        None,
        description="Blocks read beside `local_blocks`, the meaning that `topk` has in MiniCPM4 "
        "checkpoints. Unset, as is `top_k`: 64.",
    )
    dense_len: int = Field(
        8192, ge=0, description="Tokens that see at most this many are attended densely."
    )
    sparse_prefill: bool | PositiveInt = Field(
        False,
        description="Attend sparsely in prompts too, from `dense_len` on, for models trained that "
        "way. A number (on CPUs): the blocks that a prompt's tokens read in total, instead of "
        "`top_k`; outputs are then not shared through the prefix cache.",
    )
    prompt_selector: Literal["query"] | None = Field(
        None,
        description="What chooses in sparse prompts (on CPUs): `query`, while `selector` chooses "
        "in outputs, which are then not shared through the prefix cache. Unset: `selector`.",
    )
    host_gib: float = Field(
        4.0,
        gt=0,
        description="Host memory for keys and values, per rank; sets vLLM's number of blocks. "
        "Unset: more, if one request of `--max-model-len` needs it and that is at most half of "
        "what is free; on a GPU without `slab_gib` at least what it holds beside the model, which "
        "takes no host memory but for the queries that `previous` keeps, at most half of it.",
    )
    slab_gib: float | None = Field(
        None,
        gt=0,
        description="Device memory for frames, per rank; too little stops the start with the "
        "arithmetic. Unset: what the model leaves of a GPU, which then also limits "
        "`--max-num-seqs` to the requests that it serves at once; on a CPU twice the working set "
        "of a step, at most all blocks, for as many of these requests as memory holds.",
    )
    staging_blocks: PositiveInt = Field(
        32, description="Blocks per half of the double buffer that streams prompts back."
    )
    resident: bool = Field(False, description="Keep every block on the device; nothing is fetched.")
    resident_first_layer: bool = Field(
        False,
        description="Keep every block of layer 0 on the device, whose selection cannot look ahead.",
    )
    prefetch: bool = Field(
        True,
        description="Fetch a layer ahead. Off, for comparison: select ahead, fetch when the layer "
        "runs.",
    )
    link_gb_per_s: float | None = Field(
        None, gt=0, description="Slow the CPU's copy engine to this rate, to study overlap."
    )
    poison: bool = Field(
        False, description="Fill frames and host blocks with NaN until written, for debugging."
    )

    @property
    def windows_per_block(self) -> int:
        """Compressed keys of a block and KV head."""
        return max(1, self.block_size // self.kernel_stride)

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
        alike = self.chosen_prompt_selector == self.chosen_selector
        return bool(self.sparse_prefill) and alike and self.prompt_blocks_read == self.blocks_read

    @property
    def chosen_selector(self) -> str:
        """The selector in force."""
        if self.selector or self.forecast:
            return self.selector or "forecast"
        # Models that attend sparsely in prompts were trained with their own queries choosing.
        return "query" if self.sparse_prefill else "previous"

    @property
    def chosen_prompt_selector(self) -> str:
        """The selector in force in sparse prompts."""
        return self.prompt_selector or self.chosen_selector

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
        if self.prompt_selector and not self.sparse_prefill:
            raise ValueError(
                f"prompt_selector={self.prompt_selector} chooses in sparse prompts only, and "
                "sparse_prefill is off; set sparse_prefill, or leave prompt_selector out"
            )
        if self.sparse_prefill and self.chosen_prompt_selector == "previous":
            raise ValueError(
                "sparse_prefill needs a selector that looks at each token; previous reuses the "
                "last token's choice. Set prompt_selector to query, or choose another selector"
            )
        if self.resident and (self.slab_gib is not None or self.resident_first_layer):
            raise ValueError(
                "resident keeps every block on the device, so slab_gib and resident_first_layer "
                "have no meaning with it"
            )
        return self
