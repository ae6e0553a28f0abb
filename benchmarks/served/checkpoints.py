# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Small random checkpoints by name, as the tests have them, with a tokenizer that writes JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from benchmarks.soak.serving import ROOT

if TYPE_CHECKING:
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
        """The folder of a checkpoint, or of what was made beside one."""
        at = self._folder / name
        if not at.exists():
            self._make(name, at)
            from support.server import add_tokenizer

            add_tokenizer(at, CHARACTERS)
        return at

    def for_hugging_face(self, name: str) -> Path:
        """The same model as Hugging Face knows it: without layers that only draft."""
        return self.path("qwen2" if name == "mimo" else name)

    def _make(self, name: str, at: Path) -> None:
        from reference import lora, random_models
        from support.drafters import save_eagle3, save_knowing_eagle, save_mimo

        if name == "llama":
            random_models.save_random_model(at)
        elif name == "experts":
            random_models.save_random_model(at, "qwen3_moe", layers=3)
        elif name == "windows":
            random_models.save_random_model(at, "gemma3", layers=4)
        elif name == "states":
            random_models.save_random_hybrid(at)
        elif name == "small states":  # whose blocks hold as many tokens in fp8
            random_models.save_random_hybrid(at, state=4)
        elif name == "delta nets":
            random_models.save_random_delta_net(at)
        elif name == "sinks":
            random_models.save_random_gpt_oss(at)
        elif name == "qwen2":
            random_models.save_random_model(at, "qwen2")
        elif name == "mimo":
            save_mimo(at, self.path("qwen2"))
        elif name == "eagle3":
            save_eagle3(at, self.path("llama"))
        elif name in ("adapter", "merged"):
            lora.save_adapter(self.path("llama"), self._folder)
        elif name == "known":
            random_models.save_random_model(at, layers=1)
            save_knowing_eagle(self._folder / "eagle", at)
        assert at.exists(), name
