# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The registry of arms: each one side of a comparison, stock vLLM or a backend with settings.

A name such as ``rocketkv-512`` is a kind of `KINDS` and the number that its setting gets. A new
kind is one line there; accuracy, speed, capacity, memory and the GPU programs all read it.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import results

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping

GIB = 1 << 30
DENSE = "dense"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: As given on the command line.
        settings: The backend's settings; None for stock vLLM.
        backend: Its name; of no meaning without settings.
        label: For tables.
        cache_dtype: ``--kv-cache-dtype``; empty: vLLM's choice.
        tree: Another checkout, with an environment of its own, whose vLLM and plugin are measured.
    """

    name: str
    settings: dict[str, Any] | None = None
    backend: str = "ROCKETKV"
    label: str = field(default="", compare=False)
    cache_dtype: str = ""
    tree: Path | None = None

    @property
    def folder(self) -> Path:
        """The checkout that is measured."""
        return self.tree or results.ROOT

    @property
    def python(self) -> str:
        """The Python of that checkout."""
        return str(self.tree / _PYTHON) if self.tree else sys.executable

    def engine_args(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `LLM` that switch the backend on, and an fp8 cache.

        Args:
            shared: What all arms have in common. SPARDA's host pool gets as many bytes as stock
                vLLM's KV pool, unless the settings say otherwise.
        """
        cache = {"kv_cache_dtype": self.cache_dtype} if self.cache_dtype else {}
        if self.settings is None:
            return cache
        settings = self.settings
        if self.backend == "SPARDA" and "kv_cache_memory_bytes" in shared:
            settings = {"host_gib": shared["kv_cache_memory_bytes"] / GIB, **settings}
        section = {"vllm_sparse": settings}
        return {"attention_backend": self.backend, "additional_config": section, **cache}


class Kind(NamedTuple):
    """A line of the registry.

    Attributes:
        backend: For ``--attention-backend``; None for stock vLLM.
        number: Setting that the number in a name becomes; None if names have none.
        label: For tables; ``{n}`` stands for the number.
        settings: What the kind implies; wins over anything else.
        defaults: What it starts from.
    """

    backend: str | None
    number: str | None
    label: str
    settings: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default is never changed
    defaults: dict[str, Any] = {}  # noqa: RUF012


def _budget(backend: str, label: str, **settings: Any) -> Kind:
    return Kind(backend, "token_budget", label, settings)


def _blocks(label: str, number: str | None = "top_k", **settings: Any) -> Kind:
    # As few forced blocks as the backend allows, so that the selection has to find what is asked.
    forced = {"init_blocks": 1, "local_blocks": 2, "dense_len": 0}
    return Kind("SPARDA", number, label, settings, forced)


def _prompts(label: str, **settings: Any) -> Kind:
    # All read as many blocks at decode, so that only prompts differ.
    decode = {"init_blocks": 1, "local_blocks": 2, "dense_len": 0, "top_k": 32}
    return Kind("SPARDA", "sparse_prefill", label, settings, {"selector": "query", **decode})


KINDS = {
    DENSE: Kind(None, None, "stock (dense)"),
    "rocketkv": _budget("ROCKETKV", "ROCKETKV, t = {n}"),
    "rocket": _budget("ROCKETKV", "t = {n}"),
    "stage1": _budget("ROCKETKV", "t = {n}, stage 1 only", stage2=False),
    "stage2": _budget("ROCKETKV", "t = {n}, stage 2 only", stage1=False),
    "page1": _budget("ROCKETKV", "t = {n}, page size 1", page_sizes=[1]),
    "page2": _budget("ROCKETKV", "t = {n}, page size 2", page_sizes=[2]),
    "page4": _budget("ROCKETKV", "t = {n}, page size 4", page_sizes=[4]),
    "page8": _budget("ROCKETKV", "t = {n}, page size 8", page_sizes=[8]),
    "page16": _budget("ROCKETKV", "t = {n}, page size 16", page_sizes=[16]),
    "skip1": _budget("ROCKETKV", "t = {n}, `skip_layers` 1", skip_layers=1),
    "skip2": _budget("ROCKETKV", "t = {n}, `skip_layers` 2", skip_layers=2),
    "quest": _budget("QUEST", "QUEST, t = {n}"),
    "snapkv": _budget("SNAPKV", "SNAPKV, t = {n}"),
    "streamingllm": _budget("STREAMINGLLM", "STREAMINGLLM, t = {n}"),
    "query": _blocks("`query`, {n}", selector="query"),
    "lookahead": _blocks("`lookahead-query`, {n}", selector="lookahead-query"),
    "previous": _blocks("`previous`, {n}", selector="previous"),
    "forecast": _blocks("`forecast`, {n}", selector="forecast"),
    "sparda": _blocks("SPARDA, {n} blocks"),
    "prompts": _prompts("prompts of {n} blocks"),
    "prompts-lookahead": _prompts(
        "prompts of {n} blocks, `lookahead-query`", selector="lookahead-query"
    ),
    "prompts-forecast": _prompts("prompts of {n} blocks, `forecast`", selector="forecast"),
    "prompts-query-forecast": _prompts(
        "prompts of {n} blocks by `query`, outputs by `forecast`",
        selector="forecast",
        prompt_selector="query",
    ),
    "sparse-dense": _blocks(
        "SPARDA, every block", None, selector="query", top_k=8, dense_len=1 << 30
    ),
}
POLICIES = ("rocketkv", "quest", "snapkv", "streamingllm")
# Names of arms by the name of a group, which --arms takes too.
GROUPS = {
    "policies": (DENSE, *(f"{kind}-{t}" for kind in POLICIES for t in (256, 512, 1024))),
    "selectors": (
        *(DENSE, "sparse-dense"),
        *(f"{kind}-{top}" for kind in ("query", "lookahead", "previous") for top in (8, 16, 32)),
    ),
    "ablations": (
        *(DENSE, "rocket-128", "rocket-256", "rocket-512", "rocket-1024", "stage1-512"),
        *("stage2-512", "page1-512", "page2-512", "skip1-512"),
    ),
}
_LOCAL = re.compile(r"(.+)-local-(\d+)")
_FP8 = "+fp8"
_PYTHON = ".venv/bin/python"


def parse_arm(
    name: str,
    settings: dict | None = None,
    forecast: str | None = None,
    trees: Mapping[str, Path] | None = None,
) -> Arm:
    """Returns the arm of a name.

    Args:
        name: A kind of `KINDS` and, after a dash, its number. Anything may follow ``dense-``, to
            have it twice; ``-local-BLOCKS`` may follow SPARDA's. Then ``+fp8`` gives it an fp8
            cache, and ``@TREE`` runs it in another checkout.
        settings: Further settings; an arm takes those that its backend has, and those that its
            name implies win.
        forecast: Forecast weights, for the selector of that name.
        trees: Checkouts by name.

    Raises:
        ValueError: There is no such arm, or forecast weights or its checkout are missing.
    """
    if "@" in name:
        plain, _, tree = name.rpartition("@")
        if tree not in (trees or {}):
            raise ValueError(
                f"arm {name} needs --tree {tree}=FOLDER, which speed, prompts and generations have"
            )
        # Its worker runs in the other checkout, which may have a file of that name.
        arm = parse_arm(plain, settings, forecast and str(Path(forecast).absolute()))
        return replace(arm, name=name, label=f"{arm.label}, {tree}", tree=trees[tree])
    if name.endswith(_FP8):
        plain = parse_arm(name.removesuffix(_FP8), settings, forecast)
        return replace(plain, name=name, label=f"{plain.label}, fp8", cache_dtype="fp8")
    local = _LOCAL.fullmatch(name)
    stem, _, number = (local[1] if local else name).rpartition("-")
    if name.partition("-")[0] == DENSE:
        return Arm(name, label=KINDS[DENSE].label)
    kind = KINDS.get(name) or KINDS.get(stem)
    numbered = kind is not None and kind.number is not None and number.isdigit()
    if kind is None or bool(kind.number) != numbered or (local and kind.backend != "SPARDA"):
        known = [f"{key}-N" if kind.number else key for key, kind in KINDS.items()]
        raise ValueError(f"unknown arm {name!r}: expected one of {', '.join([*known, *GROUPS])}")
    implied = dict(kind.settings)
    if kind.number:
        implied[kind.number] = int(number)
    if local:
        implied["local_blocks"] = int(local[2])
    if kind.settings.get("selector") == "forecast":
        if forecast is None:
            raise ValueError(f"arm {name} needs --forecast FILE")
        implied["forecast"] = str(forecast)
    known = {**kind.defaults, **_known(kind.backend or "", settings or {})}
    return Arm(name, {**known, **implied}, kind.backend or "", kind.label.format(n=number))


def label(name: str) -> str:
    """What tables call an arm; its name if it is in no registry."""
    try:
        return parse_arm(name, None, "file", {name.rpartition("@")[2]: Path()}).label
    except ValueError:
        return name


def _known(backend: str, settings: dict) -> dict:
    """Returns the settings that a backend has.

    Raises:
        ValueError: Some setting belongs to no backend.
    """
    from vllm_sparse.registry import entries, settings_class

    fields = {name: set(settings_class(name.lower()).model_fields) for name in entries()}
    strange = set(settings) - set.union(*fields.values())
    if strange:
        raise ValueError(f"no backend has a setting {sorted(strange)[0]!r}")
    own = fields.get(backend, set())
    return {key: value for key, value in settings.items() if key in own}


def add_options(
    parser: argparse.ArgumentParser, default: str, note: str = "", *, trees: bool = False
) -> None:
    """Adds the options that say which arms to run: --arms, --setting, --forecast, --tree."""
    parser.add_argument(
        "--arms", default=default, help=f"comma-separated{note}, or a group: {', '.join(GROUPS)}"
    )
    parser.add_argument(
        "--setting", nargs="+", default=[], metavar="KEY=JSON",
        help="of a backend, for every arm that has it",
    )  # fmt: skip
    parser.add_argument("--forecast", metavar="FILE", help="weights for forecast arms")
    if trees:
        parser.add_argument(
            "--tree", nargs="+", default=[], metavar="NAME=FOLDER",
            help="a checkout with a .venv, of another commit; arms ARM@NAME run there",
        )  # fmt: skip


def parse_arms(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    defaults: dict | None = None,
    *,
    baseline: bool = False,
) -> list[Arm]:
    """Returns the arms that the options of :func:`add_options` name.

    Args:
        parser: Reports what is wrong.
        options: Parsed.
        defaults: Settings that --setting may override.
        baseline: The first arm must be the one that the others are compared with.
    """
    try:
        settings = {**(defaults or {}), **parse_settings(options.setting)}
        names = GROUPS.get(options.arms) or options.arms.split(",")
        trees = parse_trees(getattr(options, "tree", []))
        found = [parse_arm(name, settings, options.forecast, trees) for name in names]
    except ValueError as error:
        parser.error(str(error))
    if baseline and found[0].settings is not None:
        parser.error(f"the first arm must be {DENSE}: the others are compared with it")
    return found


def parse_trees(pairs: Iterable[str]) -> dict[str, Path]:
    """Parses ``NAME=FOLDER`` pairs.

    Raises:
        ValueError: A pair is none, or there is no checkout with an environment.
    """
    found = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        found[name] = Path(folder).absolute()
        for needed in (_PYTHON, "benchmarks/worker.py"):
            if not folder or not (found[name] / needed).is_file():
                raise ValueError(
                    f"--tree {pair}: expected NAME=FOLDER, a checkout in which `make setup` was run"
                    f" (no {needed})"
                )
    return found


def commits(chosen: Iterable[Arm]) -> dict[str, str | None]:
    """The commit of each other checkout that arms run in, by their names."""
    return {arm.name: results.commit(arm.tree) for arm in chosen if arm.tree}


def parse_settings(pairs: Iterable[str]) -> dict:
    """Parses ``KEY=VALUE`` pairs whose values are JSON.

    Raises:
        ValueError: A pair is none.
    """
    settings = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        settings[key] = json.loads(value)
    return settings
