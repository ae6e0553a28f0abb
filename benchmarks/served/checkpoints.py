# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Small random checkpoints by name, as the tests have them, with a tokenizer that writes JSON."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from benchmarks.soak.serving import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Not as tests.reference: some other package's "tests" may be installed.
sys.path.insert(0, str(ROOT / "tests"))

ENDS_TEXT = "~"
CHARACTERS = ENDS_TEXT + '{}":,abnos[]0123456789'


class Checkpoints:
    """Written when they are first asked for.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """The folder of a checkpoint: a method's name, or what one of them has made beside it."""
        at = self._folder / name
        if not at.exists():
            make: Callable[[Path], None] = getattr(self, f"_{name}")
            make(at)
            from support.server import add_tokenizer

            add_tokenizer(at, CHARACTERS)
        return at

    def _llama(self, at: Path) -> None:
        from reference.hf_rocketkv import save_random_llama

        save_random_llama(at)

    def _experts(self, at: Path) -> None:
        from reference.random_models import save_random_model

        save_random_model(at, "qwen3_moe", layers=3)

    def _windows(self, at: Path) -> None:
        from reference.random_models import save_random_model

        save_random_model(at, "gemma3", layers=4)

    def _states(self, at: Path) -> None:
        from reference.random_models import save_random_hybrid

        save_random_hybrid(at)

    def _merged(self, at: Path) -> None:
        from reference.lora import save_adapter

        save_adapter(self.path("llama"), self._folder)
        assert at.exists()

    def _adapter(self, at: Path) -> None:
        self._merged(at)

    def _known(self, at: Path) -> None:
        from reference.hf_rocketkv import save_random_llama
        from support.drafters import save_knowing_eagle

        save_random_llama(at, layers=1)
        save_knowing_eagle(self._folder / "eagle", at)

    def copy(self, name: str, to: Path) -> None:
        """A checkpoint that may be changed."""
        shutil.copytree(self.path(name), to)
