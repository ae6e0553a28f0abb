# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Text to sequences of equal length: read, tokenised, packed, and ordered by a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_sparse.training.settings import Packing

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


def read_documents(sources: Iterable[str], text_key: str = "text") -> Iterator[str | list[int]]:
    """The documents of all sources, in a fixed order.

    Args:
        sources: Each a text file (one document), a ``.jsonl`` file (one per line), a folder of
            those, or a dataset for the package ``datasets``: ``NAME``, ``NAME:SPLIT`` or
            ``NAME:CONFIGURATION:SPLIT``.
        text_key: Where the text is in a JSON line or a dataset's row. A list of token ids may
            stand there too.

    Raises:
        ConfigError: A source does not exist or cannot be read.
    """
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(item for item in path.rglob("*") if item.suffix in _TEXT_SUFFIXES)
            if not files:
                raise ConfigError(
                    f"data: {source} holds no file that ends in {', '.join(_TEXT_SUFFIXES)}"
                )
            for file in files:
                yield from _read_file(file, text_key)
        elif path.is_file():
            yield from _read_file(path, text_key)
        else:
            yield from _read_dataset(source, text_key)


def _read_file(path: Path, text_key: str) -> Iterator[str | list[int]]:
    if path.suffix != ".jsonl":
        yield _plain_text(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"data: {path}, line {number}: no JSON object with a key {text_key!r} "
                    f"({error!r}); set --text-key to the key that holds the text"
                ) from error
            yield _document(document, f"{path}, line {number}")


def _plain_text(path: Path) -> str:
    """A file as one text, of which a few bytes may be no UTF-8."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    if "\0" in text or text.count("\N{REPLACEMENT CHARACTER}") > len(text) / 1000:
        raise ConfigError(
            f"data: {path} is no text in UTF-8. Unpack or convert it; JSON lines end in .jsonl"
        )
    return text


def _document(found: Any, where: str) -> str | list[int]:
    """What stands where a text, or its token ids, should."""
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(type(token) is int for token in found):
        return found
    raise ConfigError(f"data: {where}: {found!r:.60} is neither a text nor a list of token ids")


def _read_dataset(source: str, text_key: str) -> Iterator[str | list[int]]:
    name, *rest = source.split(":")
    split = (rest[-1] if rest else "") or "train"
    configuration = rest[0] if len(rest) > 1 else None
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"data: {source!r} is no file or folder. If it is the name of a dataset, install the "
            "package datasets (pip install '.[data]' in the checkout of vllm-sparse)"
        ) from None
    try:
        rows: Any = datasets.load_dataset(name, configuration, split=split, streaming=True)
        for row in rows:
            if text_key not in row:
                raise ConfigError(
                    f"data: the rows of {source!r} have no {text_key!r} but {', '.join(row)}; set "
                    "--text-key to what holds the text"
                )
            yield _document(row[text_key], source)
    except ConfigError:
        raise
    except Exception as error:  # the package raises many kinds
        raise ConfigError(
            f"data: {source!r} is no file or folder, and the package datasets cannot read it as "
            f"{name!r}, configuration {configuration or 'default'!r}, split {split!r}: {error}"
        ) from error


def read_sequences(
    sources: list[str],
    tokenizer: Any,
    seq_len: int,
    packing: Packing,
    text_key: str,
    limit: int | None,
    needed: int,
    show: Callable[[Iterator[str | list[int]]], Iterable[str | list[int]]] = iter,
) -> tuple[Tensor, list[str]]:
    """Sequences of equal length from all sources.

    Args:
        sources: As for :func:`read_documents`.
        tokenizer: A Hugging Face tokenizer.
        seq_len: Tokens per sequence.
        packing: As for :func:`pack`.
        text_key: As for :func:`read_documents`.
        limit: Use so many sequences, the first ones.
        needed: The limit if none is given and a source is a dataset, which may never end and is
            held in memory by every process. Files are read whole.
        show: Wraps the documents, to show how many were read.

    Returns:
        int32 ``[sequences, seq_len]``, and the sources that were not reached.

    Raises:
        ConfigError: A source cannot be read, or there is less text than one sequence.
    """
    if limit is None and any(not Path(source).exists() for source in sources):
        limit = needed
    left = list(sources)

    def documents() -> Iterator[str | list[int]]:
        while left:
            yield from read_documents([left.pop(0)], text_key)

    return pack(show(documents()), tokenizer, seq_len, packing, limit), left


def pack(
    documents: Iterable[str | list[int]],
    tokenizer: Any,
    seq_len: int,
    packing: Packing = "concat",
    limit: int | None = None,
) -> Tensor:
    """Sequences of equal length.

    Args:
        documents: Texts, or token ids.
        tokenizer: A Hugging Face tokenizer.
        seq_len: Tokens per sequence.
        packing: ``concat``: one stream, cut everywhere, with the end-of-text token between
            documents. ``documents``: a sequence begins where its document or its last piece does;
            what is left at a document's end is dropped.
        limit: Stop after so many sequences.

    Returns:
        int32 ``[sequences, seq_len]``.

    Raises:
        ConfigError: There is less text than one sequence.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    rest = np.empty(0, np.int32)
    longest = 0
    for document in documents:
        tokens: list[int] = (
            tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            if isinstance(document, str)
            else document
        )
        longest = max(longest, len(tokens))
        if packing == "concat":
            rest = np.concatenate((rest, np.array(tokens + end, np.int32)))
        else:
            rest = np.array(tokens, np.int32)
        whole = len(rest) // seq_len
        pieces.extend(rest[: whole * seq_len].reshape(whole, seq_len))
        rest = rest[whole * seq_len :]
        if limit and len(pieces) >= limit:
            break
    if not pieces:
        raise ConfigError(
            f"data: the text is shorter than one sequence of seq_len={seq_len} tokens (longest "
            f"document: {longest}). Give more text or a smaller --seq-len, or use --packing concat"
        )
    return torch.from_numpy(np.stack(pieces[:limit]))


def sequence_index(number: int, count: int, seed: int) -> int:
    """The sequence that is trained on as the ``number``-th, each epoch in an order of its own.

    It depends on nothing but its arguments, so a resumed run goes on where it stopped.
    """
    epoch, place = divmod(number, count)
    return int(np.random.default_rng((seed, epoch)).permutation(count)[place])
