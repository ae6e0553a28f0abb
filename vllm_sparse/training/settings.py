# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Settings of a training run: a recipe file, overridden by options of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from vllm_sparse.config import read_values, validated

if TYPE_CHECKING:
    from vllm_sparse.training.geometry import BlockGeometry

RECIPES = "vllm_sparse.training.recipes"

# Here and not where they are used, so that the command line's help needs no torch.
TeacherKind = Literal["fine", "query", "block-mass"]
Supervision = Literal["selected", "free"]
Init = Literal["lookahead", "uniform"]
Packing = Literal["concat", "documents"]


class TrainSettings(BaseModel):
    """Settings of ``train-forecast``; defaults are SparDA's recipe for MiniCPM4.1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seq_len: PositiveInt = Field(65536, description="Tokens per sequence.")
    packing: Packing = Field(
        "concat", description="concat: one stream of text. documents: never across documents."
    )
    text_key: str = Field("text", description="Key of the text in JSON lines and datasets.")
    max_sequences: PositiveInt | None = Field(None, description="Use only the first sequences.")

    block_size: PositiveInt = Field(64, description="Tokens per block.")
    kernel_stride: PositiveInt = Field(
        16, description="Tokens between compressed keys, each the mean of twice as many tokens."
    )
    init_blocks: PositiveInt = Field(1, description="Blocks at the start that are always read.")
    local_blocks: PositiveInt = Field(
        32, description="Blocks before the current one that are always read."
    )
    top_k: PositiveInt = Field(96, description="Blocks read in total.")

    teacher: TeacherKind = Field(
        "fine",
        description="What to learn. fine: SparDA's teacher. query: the InfLLM-v2 selector. "
        "block-mass: exact attention mass per block, for densely trained models.",
    )
    supervision: Supervision = Field(
        "selected",
        description="selected: the teacher's chosen blocks against the rest. free: all blocks "
        "that are not always read, and nothing else.",
    )
    sparse_forward: bool = Field(
        True,
        description="Let the frozen model attend to the teacher's blocks only; off for densely "
        "trained models.",
    )
    init: Init = Field(
        "lookahead",
        description="First weights. lookahead: the next layer's query projection, averaged over "
        "a group, its bias folded in. uniform: SparDA's.",
    )
    bias: bool = Field(
        False, description="Train a bias too. Not in SparDA's format; for models like Qwen2."
    )
    queries: int = Field(
        0, ge=0, description="Random query tokens per sequence that are trained on; 0: all."
    )
    tail_queries: int = Field(
        0, ge=0, description="How many of these are the last tokens of the sequence."
    )

    steps: PositiveInt = Field(2000, description="Optimiser steps.")
    batch_size: PositiveInt = Field(32, description="Sequences per step, over all processes.")
    lr: float = Field(5e-4, gt=0, description="Learning rate.")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="Learning rate after warm-up; linear falls to zero."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW.")
    eps: float = Field(1e-6, gt=0, description="AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW.")
    grad_clip: float = Field(0.5, gt=0, description="Largest norm of all gradients together.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Of the frozen model. What is trained is float32, and exported as bfloat16.",
    )
    seed: int = Field(42, ge=0, description="Of the order of data, the rows and the weights.")
    chunk: PositiveInt = Field(
        256, description="Query rows at a time: smaller takes less memory, same result."
    )

    save_every: PositiveInt = Field(100, description="Steps between checkpoints.")
    keep: PositiveInt = Field(2, description="Newest checkpoints to keep.")

    @property
    def geometry(self) -> BlockGeometry:
        """Block sizes and counts."""
        from vllm_sparse.training.geometry import BlockGeometry

        return BlockGeometry(
            self.block_size, self.kernel_stride, self.init_blocks, self.local_blocks, self.top_k
        )

    def history(self, steps: int) -> dict[str, Any]:
        """What a file says of its training after so many steps."""
        told = {"seq_len", "batch_size", "teacher", "supervision", "sparse_forward", "seed"}
        return self.model_dump(include=told) | {"steps": steps}

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from zero."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "linear":
            return self.lr * (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.lr


def load_train_settings(recipe: str | None, overrides: dict[str, Any]) -> TrainSettings:
    """Settings of a recipe with some of them changed.

    Args:
        recipe: Name of a shipped recipe or path of a YAML file; None for the defaults.
        overrides: Values that win.

    Raises:
        ConfigError: Unknown recipe or setting, or a value that makes no sense.
    """
    values = {} if recipe is None else read_values("recipe", recipe, RECIPES, "recipe")
    settings = validated(TrainSettings, {**values, **overrides})
    settings.geometry.require_length(settings.seq_len)
    return settings
