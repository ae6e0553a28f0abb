# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM's scheduler knows: requests, and the blocks that they own or share."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple


class Request:
    """What the scheduler of vLLM knows of a request."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt_len = len(prompt)
        self.tokens = list(prompt)
        self.contents: list[int] = []  # of each token: a number for all tokens up to it
        self.blocks: list[int] = []
        self.computed = 0


class Allocator:
    """vLLM's block pool: counts references, shares full blocks, forgets them when it must."""

    def __init__(self, blocks: int) -> None:
        self.free = deque(range(1, blocks))  # block 0 is vLLM's null block
        self.references: Counter[int] = Counter()
        self.block_of: dict[int, int] = {}
        self.content_of: dict[int, int] = {}

    def allocate(self) -> int:
        block = self.free.popleft()
        self.forget(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        if not self.references[block]:
            self.free.remove(block)
        self.references[block] += 1

    def publish(self, block: int, content: int) -> None:
        if content not in self.block_of:
            self.block_of[content] = block
            self.content_of[block] = content

    def forget(self, block: int) -> None:
        content = self.content_of.pop(block, None)
        self.block_of.pop(content, None)

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            assert self.references[block] >= 0
            if not self.references[block]:
                self.free.append(block)


class Row(NamedTuple):
    """What a step computes of a request."""

    request: Request
    start: int
    end: int
