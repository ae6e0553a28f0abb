# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM's ``suffix`` drafter asks of the package arctic-inference, by plain search.

Suffix decoding (arXiv 2411.04975) drafts what followed the longest end of a text where that end
occurred before. The package keeps suffix trees; this walks the texts.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

PACKAGE = "arctic_inference"


class SuffixDecodingCache:
    """Texts of requests, and drafts from them.

    Args:
        max_tree_depth: Tokens of the longest end that is searched for.
    """

    def __init__(self, max_tree_depth: int, **_: Any) -> None:
        self._depth = max_tree_depth
        self._prompts: dict[str, list[int]] = {}
        self._responses: dict[str, list[int]] = {}
        self.active_requests: set[str] = set()

    @property
    def cached_requests(self) -> set[str]:
        return set(self._responses)

    def start_request(self, request: str, prompt: Any) -> None:
        assert request not in self._responses
        self.active_requests.add(request)
        self._prompts[request], self._responses[request] = prompt.tolist(), []

    def add_active_response(self, request: str, tokens: list[int]) -> None:
        assert request in self.active_requests
        self._responses[request] += tokens

    def stop_request(self, request: str) -> None:
        self.active_requests.remove(request)
        del self._prompts[request]

    def evict_cached_response(self, request: str) -> None:
        assert request not in self.active_requests
        del self._responses[request]

    def speculate(
        self, request: str, pattern: Any, max_spec_tokens: int, max_spec_factor: float, **_: Any
    ) -> SimpleNamespace:
        """Up to ``max_spec_factor`` tokens per matched one; none where nothing matches."""
        own = self._prompts[request] + self._responses[request]
        end = pattern.tolist()
        assert own[-len(end) :] == end, "the drafter knows other tokens than the runner"
        texts = [own, *(text for name, text in self._responses.items() if name != request)]
        for length in range(min(len(end), self._depth), 0, -1):
            for text in texts:
                for at in range(len(text) - length - 1, -1, -1):
                    if text[at : at + length] == end[-length:]:
                        longest = min(max_spec_tokens, int(length * max_spec_factor))
                        return SimpleNamespace(token_ids=text[at + length : at + length + longest])
        return SimpleNamespace(token_ids=[])


def install() -> None:
    """Let ``import arctic_inference.suffix_decoding`` find this module's class."""
    package = ModuleType(PACKAGE)
    package.__spec__ = ModuleSpec(PACKAGE, None)
    module = ModuleType(f"{PACKAGE}.suffix_decoding")
    module.SuffixDecodingCache = SuffixDecodingCache  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module, PACKAGE: package})
