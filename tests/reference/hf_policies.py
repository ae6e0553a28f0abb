# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What QUEST and STREAMINGLLM read, for a Hugging Face model under an explicit mask.

SNAPKV is RocketKV's stage 1 with another pool, which :func:`.hf_rocketkv.generate` has. Independent
of the library under test.
"""

import math

import torch


class Run:
    """A generation in progress; subclasses say what a decode step sees."""

    def __init__(self, prompt_len):
        self.prompt_len = prompt_len
        self.in_prompt = True
        self.scaling = self.learned_sinks = None  # the model's own
        self.kept = {}  # layer -> [G, N]
        self.prompt_gap = self.page_gap = self.channel_gap = math.inf

    def end_prompt_of_layer(self, layer, query, keys):
        self.kept[layer] = torch.arange(keys.shape[1]).repeat(keys.shape[0], 1)

    def pages(self, scores, n, page_size, top_k):
        """Tokens of the newest page, then of those with the highest scores, up to ``top_k``."""
        newest = (n - 1) // page_size
        ranked = sorted(range(newest), key=lambda page: (-scores[page], page))
        tokens = list(range(newest * page_size, n))[:top_k]
        for place, page in enumerate(ranked):
            room = top_k - len(tokens)
            if room <= 0:
                before = scores[ranked[place - 1]] if place else math.inf
                self.page_gap = min(self.page_gap, float(before - scores[page]))
                break
            tokens += list(range(page * page_size, (page + 1) * page_size))[:room]
        return torch.tensor(sorted(tokens))


class Quest(Run):
    """Pages by the upper bounds of their logits, a softmax per head, summed over the group."""

    def __init__(self, prompt_len, page_size, top_k, skip_layers):
        super().__init__(prompt_len)
        self.page_size, self.top_k, self.skip_layers = page_size, top_k, skip_layers

    def visible_tokens(self, layer, query, keys):
        groups, n, dim = keys.shape
        if layer < self.skip_layers:
            return [torch.arange(n)] * groups
        found = []
        for g, heads in enumerate(query.double().view(groups, -1, dim)):
            pages = keys[g].double().split(self.page_size)
            low = torch.stack([page.min(0).values for page in pages])
            high = torch.stack([page.max(0).values for page in pages])
            scale = 1 / math.sqrt(dim) if self.scaling is None else self.scaling
            total = torch.zeros(len(pages), dtype=torch.float64)
            for at, head in enumerate(heads, g * len(heads)):
                bounds = torch.maximum(head * low, head * high).sum(1) * scale
                if self.learned_sinks is not None:
                    own = self.learned_sinks[at : at + 1].double()
                    bounds = torch.cat((bounds, own))
                total += bounds.softmax(0)[: len(pages)]
            found.append(self.pages(total, n, self.page_size, self.top_k))
        return found


class StreamingLLM(Run):
    """The first tokens and the last."""

    def __init__(self, prompt_len, sinks, budget):
        super().__init__(prompt_len)
        self.sinks, self.budget = sinks, budget

    def visible_tokens(self, layer, query, keys):
        groups, n, _ = keys.shape
        last = range(max(self.sinks, n - self.budget + self.sinks), n)
        return [torch.tensor([*range(self.sinks), *last])] * groups


class LargeKeys(Run):
    """The policy of ``tests/support/outside.py``: tokens of large keys, pages by their mean key."""

    def __init__(self, prompt_len, num_kept, page_size, top_k):
        super().__init__(prompt_len)
        self.num_kept, self.page_size, self.top_k = num_kept, page_size, top_k

    def end_prompt_of_layer(self, layer, query, keys):
        norms = keys.norm(dim=-1)
        order = norms.sort(dim=-1, descending=True, stable=True).indices[:, : self.num_kept]
        self.kept[layer] = order.sort(-1).values

    def visible_tokens(self, layer, query, keys):
        groups, n, dim = keys.shape
        found = []
        for g, heads in enumerate(query.view(groups, -1, dim)):
            held = torch.cat((self.kept[layer][g], torch.arange(self.prompt_len, n)))
            pages = keys[g, held].split(self.page_size)
            scores = torch.stack([(heads @ page.mean(0)).sum() for page in pages])
            found.append(held[self.pages(scores, len(held), self.page_size, self.top_k)])
        return found
