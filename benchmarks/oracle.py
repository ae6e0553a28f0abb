# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The accuracy of a perfect selection: exact top-k attention per KV head, outside vLLM.

The model runs in transformers. The prompt is processed densely; every decode step computes all
attention weights, sums them over the query heads of a KV head, and attends to the k tokens with
the largest sums. No method that reads k tokens per KV head and step can be expected to do better.
ROCKETKV with a token budget of t attends to t / 2 tokens.

With ``--blocks``, also to the blocks of 64 tokens with the largest sums, beside the first and the
last blocks that are always read: what SPARDA would do if its selector knew the attention weights.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import corpus, harness, needles
from benchmarks.accuracy import PROSE_CONTEXT, PROSE_TOKENS, judged
from benchmarks.quality.schemes import FEW_FORCED, summed, tokens_of_best_blocks
from benchmarks.results import Recorder

NAME = "exact_topk"
DENSE = "dense (transformers)"


@dataclass(frozen=True)
class Budget:
    """What one decode step may read per KV head: `k` tokens, or blocks in total."""

    k: int
    blocks: bool = False

    def tokens(self) -> int:
        """Tokens that it reads at most."""
        return self.k * FEW_FORCED.block_size if self.blocks else self.k


def read_tokens(weights: torch.Tensor, top_k: int) -> torch.Tensor:
    """The tokens of the heaviest blocks and of those that are always read.

    Args:
        weights: Attention of the newest token, ``[G, n]``.
        top_k: Blocks in total.

    Returns:
        bool ``[G, n]``.
    """
    sizes = replace(FEW_FORCED, top_k=top_k)
    return tokens_of_best_blocks(summed(weights, sizes.block_size), weights.shape[-1], sizes)


class ExactTopK:
    """Attention function for transformers; `budget` may be changed between calls, None is dense."""

    def __init__(self) -> None:
        self.budget: Budget | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Attends to the best tokens or blocks per KV head in decode steps, densely otherwise.

        Args:
            module: The attention layer.
            query: [1, query heads, tokens, head size].
            key: [1, KV heads, context, head size].
            value: [1, KV heads, context, head size].
            attention_mask: Only for prefill; a decode step of one request sees everything.
            scaling: Factor of the scores.
            **kwargs: For the dense function.
        """
        num_tokens, context, budget = query.shape[2], key.shape[2], self.budget
        if num_tokens > 1 or budget is None or budget.tokens() >= context:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        kv_heads, head_dim = key.shape[1], key.shape[3]
        scale = head_dim**-0.5 if scaling is None else scaling
        grouped = query[0, :, 0].view(kv_heads, -1, head_dim).float()  # [G, heads per group, D]
        scores = grouped @ key[0].float().transpose(1, 2) * scale  # [G, heads per group, n]
        weights = scores.softmax(-1).sum(1)  # [G, n]
        if budget.blocks:
            read = read_tokens(weights, budget.k)[:, None]
            kept = scores.masked_fill(~read, float("-inf")).softmax(-1)
            output = (kept @ value[0].float()).to(query.dtype)
            return output.reshape(1, 1, -1, head_dim), None
        best = weights.topk(budget.k).indices  # [G, k]
        kept = scores.gather(2, best[:, None].expand(-1, scores.shape[1], -1)).softmax(-1)
        values = value[0].float().gather(1, best[..., None].expand(-1, -1, head_dim))
        output = (kept @ values).to(query.dtype)  # [G, heads per group, D]
        return output.reshape(1, 1, -1, head_dim), None


class Model:
    """A model with a cached prompt from which generation can start again and again.

    Attributes:
        attention: The attention function of decode steps.
        network: The model in transformers.
    """

    def __init__(self, directory: Path) -> None:
        self.attention = ExactTopK()
        AttentionInterface.register(NAME, self.attention)
        self.network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self._prompt: list[int] = []
        self._cache = DynamicCache(config=self.network.config)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> None:
        """Processes a prompt densely; what it shares with the previous one is not repeated."""
        pairs = zip(prompt[:-1], self._prompt, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._rewind(shared)
        self.network.set_attn_implementation("sdpa")
        rest = torch.tensor([prompt[shared:]])
        self._first = self.network(rest, past_key_values=self._cache, logits_to_keep=1).logits[
            0, -1
        ]
        self._prompt = prompt
        self.network.set_attn_implementation(NAME)

    def generate(self, num_tokens: int, eos: set[int]) -> list[int]:
        """Returns the greedy continuation of the prompt."""
        tokens: list[int] = []
        for logits in self._decode(num_tokens, lambda logits: int(logits.argmax()), tokens):
            del logits
            if tokens and tokens[-1] in eos:
                break
        return tokens

    def force(self, forced: list[int]) -> np.ndarray:
        """Returns the log-probabilities before each of the given tokens, [tokens, vocabulary]."""
        steps = iter(forced)
        rows = self._decode(len(forced), lambda _: next(steps), [])
        return np.stack([torch.log_softmax(row.float(), -1).numpy() for row in rows])

    def _decode(self, num_tokens: int, choose, tokens: list[int]):
        """Yields the logits of each step and appends the chosen tokens to `tokens`."""
        self._rewind(len(self._prompt))
        logits = self._first
        for _ in range(num_tokens):
            tokens.append(choose(logits))
            yield logits
            with torch.inference_mode():
                step = torch.tensor([[tokens[-1]]])
                logits = self.network(step, past_key_values=self._cache).logits[0, -1]

    def _rewind(self, length: int) -> None:
        surplus = self._cache.get_seq_length() - length
        if surplus > 0:
            self._cache.crop(-surplus)


def ask(
    model: Model, tokenizer, questions: list[needles.Question], arms: dict[str, Budget | None]
) -> dict[str, dict]:
    """Returns every arm's accuracy on the questions."""
    eos = {tokenizer.eos_token_id}
    replies: dict[str, list[str]] = {name: [] for name in arms}
    for question in questions:
        model.prefill(question.prompt)
        for name, budget in arms.items():
            model.attention.budget = budget
            tokens = model.generate(needles.ANSWER_TOKENS, eos)
            replies[name].append(tokenizer.decode(tokens))
    return {name: judged(questions, texts) for name, texts in replies.items()}


def prose(
    model: Model, passages: list[list[int]], prompt_tokens: int, arms: dict[str, Budget | None]
) -> dict[str, dict]:
    """Returns every arm's divergence from the first arm, teacher-forced through the passages."""
    from benchmarks import teacher

    compared: dict[str, list[dict]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="vllm-sparse-oracle-") as scratch:
        reference, other = Path(scratch) / "reference.npy", Path(scratch) / "other.npy"
        for passage in passages:
            forced = passage[prompt_tokens:]
            model.prefill(passage[:prompt_tokens])
            for index, (name, budget) in enumerate(arms.items()):
                model.attention.budget = budget
                path = other if index else reference
                np.save(path, model.force(forced))
                compared[name].append(teacher.compare(reference, path, forced))
    return {
        name: {"context": prompt_tokens, "passages": cells, **harness.mean_of(cells, teacher.MEANS)}
        for name, cells in compared.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("oracle", __doc__, "4 questions, 1 passage")
    harness.add_model(parser, "qwen")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--k", nargs="*", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--blocks", nargs="*", type=int, default=[8, 16, 32], help="of 64 tokens")
    parser.add_argument("--tasks", nargs="+", default=["single", "multikey", "prose"])
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    harness.add_threads(parser)
    options = harness.parse(parser, arguments, {"questions": 4, "passages": 1})
    torch.set_num_threads(options.threads)
    arms: dict[str, Budget | None] = {
        DENSE: None,
        **{f"exact-topk-{k}": Budget(k) for k in options.k},
        **{f"exact-blocks-{k}": Budget(k, blocks=True) for k in options.blocks},
    }
    found: dict[str, dict] = {
        name: {"settings": asdict(budget) if budget else None} for name, budget in arms.items()
    }
    body = {"model": options.model, "seed": options.seed, "arms": found}
    with Recorder(options.out, "oracle", body) as record:
        directory = harness.resolve_model(options.model)
        tokenizer, model = harness.tokenizer_of(options.model), Model(directory)
        for task in options.tasks:
            started = time.perf_counter()
            if task == "prose":
                context = min(options.context, PROSE_CONTEXT)
                length = context + PROSE_TOKENS + 1
                passages = corpus.prose_tokens(tokenizer, options.passages, length)
                cells = prose(model, passages, context, arms)
            else:
                limit = options.context - needles.ANSWER_TOKENS
                make = needles.SETS[task]
                questions = make(tokenizer, limit, options.questions, options.seed)
                answers = ask(model, tokenizer, questions, arms)
                cells = {name: {str(options.context): cell} for name, cell in answers.items()}
            for name, cell in cells.items():
                found[name][task] = cell
            record.save()
            harness.progress(f"{task}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
