# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The table of features: what it refuses stops the start; what it serves has a test, and starts."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support.asking import AHEAD, BY_CONFIGURATION
from support.configuration import configuration, drafter
from support.policies import make_policy

from vllm_sparse import registry, startup
from vllm_sparse.backends import asked
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.features import FEATURES, OUTSIDE, POLICIES, SPARDA, Refused, Served, Stock
from vllm_sparse.kv.tail.codec import PageCodec

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[1]
PLACES = [(family, on_gpu) for family in (POLICIES, SPARDA) for on_gpu in (False, True)]
NAMES = {
    family: tuple(name for name, entry in registry.entries().items() if entry.family == family)
    for family in (POLICIES, SPARDA)
}
PLAIN_LAYER = {
    **{"alibi_slopes": None, "sinks": None, "logits_soft_cap": None, "attn_type": "decoder"},
    **{"kv_sharing_target_layer_name": None, "sliding_window": None},
    **{"kv_cache_dtype": "auto", "expected_cache_dtype": "auto"},
}

# What a layer is built with.
BY_LAYER = {
    "alibi": ({"alibi_slopes": [1.0]}, "ALiBi"),
    "sinks": ({"sinks": object()}, "sinks"),
    "soft-cap": ({"logits_soft_cap": 30.0}, "capped"),
    "encoder": ({"attn_type": "encoder"}, "encoder attention"),
    "shared-caches": ({"kv_sharing_target_layer_name": "layer.0"}, "share one KV cache"),
    "hidden-windows": ({"sliding_window": 64}, "a window of 64 tokens"),
    "several-dtypes": (
        {"kv_cache_dtype": "auto", "expected_cache_dtype": "fp8"},
        "auto in a layer beside fp8 .*--kv-cache-dtype-skip-layers",
    ),
}

# Nothing can ask for these in particular.
ALWAYS = {
    *("attention", "experts", "prefix-caching", "events", "chunks", "preemption"),
    *("data-parallel", "expert-parallel", "server", "runner", "parts", "media"),
}

# A whole engine shows it.
BY_ENGINE = {
    "flash-attention": "tests/backends/test_policy_gpu.py::"
    "test_the_start_line_and_what_a_cpu_lacks",
}


def on_path(settings: dict, on_gpu: bool) -> dict:
    return {**settings, "kernels": "triton"} if on_gpu else settings


def windows(name: str, on_gpu: bool) -> None:
    from vllm_sparse.backends.refusals import check_windows

    check_windows(name, on_gpu)


def own_backends(name: str, on_gpu: bool) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from vllm_sparse.backends.refusals import check_model

    def layer(backend, window=None):
        return SimpleNamespace(
            get_attn_backend=lambda: backend, is_draft_layer=False, sliding_window=window
        )

    ours = registry.load(registry.entries()[name].cpu)
    context = {"a": layer(ours), "b": layer(CPUAttentionBackend, 64), "c": object()}
    given = SimpleNamespace(static_forward_context=context)
    config = configuration(name, compilation_config=given)
    check_model(config, on_gpu)
    context["d"] = layer(CPUAttentionBackend)
    check_model(config, on_gpu)


def states_cached(name: str, on_gpu: bool) -> None:
    """Only Mamba-2 layers, and only with prefix caching."""
    from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionBackend

    from vllm_sparse.backends.refusals import check_model

    ours = registry.load(registry.entries()[name].cpu)
    for kind, cached in (("GDN_ATTN", True), ("MAMBA2", False), ("MAMBA2", True)):
        states = SimpleNamespace(
            get_attn_backend=lambda: Mamba1AttentionBackend, mamba_type=SimpleNamespace(name=kind)
        )
        context = {"a": SimpleNamespace(get_attn_backend=lambda: ours), "b": states}
        given = SimpleNamespace(static_forward_context=context)
        config = configuration(name, compilation_config=given)
        config.cache_config.enable_prefix_caching = cached
        try:
            check_model(config, on_gpu)
        except UnsupportedError:
            assert (kind, cached) == ("MAMBA2", True)
            raise


def windows_and_drafter(name: str, on_gpu: bool) -> None:
    from vllm_sparse.backends.refusals import check_windows

    check_windows(name, on_gpu, configuration(name, speculative_config=drafter("eagle")))


def stock_layer(backend: str, version: int) -> None:
    from vllm_sparse.backends.refusals import check_stock_layers

    name = SimpleNamespace(get_name=lambda: backend)
    stock = SimpleNamespace(
        impl=SimpleNamespace(vllm_flash_attn_version=version), get_attn_backend=lambda: name
    )
    check_stock_layers([stock], int)


def flash_attention_4(name: str, on_gpu: bool) -> None:
    stock_layer("FLASH_ATTN", 3)
    stock_layer("FLASH_ATTN", 4)


def triton_windows(name: str, on_gpu: bool) -> None:
    stock_layer("TRITON_ATTN", 0)


def planning(name: str, on_gpu: bool, block_size: int, whole: int = 32, group: int = 4) -> None:
    """Two layers, of which the second has another ratio of heads."""
    from vllm_sparse.backends.policy import Planning

    policy = make_policy(head_dim=32, group_size=group, block_size=whole, max_model_len=1024,
                         **on_path({}, on_gpu))  # fmt: skip
    layer = SimpleNamespace(impl=SimpleNamespace(num_heads=4, num_kv_heads=2))
    model = SimpleNamespace(model_arch_config=SimpleNamespace())
    config = SimpleNamespace(
        model_config=model,
        compilation_config=SimpleNamespace(static_forward_context={"model.layers.0.attn": layer}),
    )
    spec = SimpleNamespace(policy=policy, backend=name)
    kernels = SimpleNamespace(name="any")
    Planning(spec, ["model.layers.0.attn"], config, block_size, kernels, False, Mock())


def sparda_layers(on_gpu: bool, block_size: int, count: int) -> None:
    from vllm_sparse.backends.sparda_setup import check_layers
    from vllm_sparse.config import load_settings

    config = configuration("SPARDA", on_path({}, on_gpu))
    settings = load_settings(config.additional_config, "sparda")
    check_layers(config, settings, SimpleNamespace(block_size=block_size), [object()] * count)


def unlike_layers(name: str, on_gpu: bool) -> None:
    sparda_layers(on_gpu, 32, 3) if name == "SPARDA" else planning(name, on_gpu, 32)


def other_blocks(name: str, on_gpu: bool) -> None:
    sparda_layers(on_gpu, 64, 4) if name == "SPARDA" else planning(name, on_gpu, 48)


def odd_blocks(name: str, on_gpu: bool) -> None:
    from vllm_sparse.backends.refusals import check_block_size

    if on_gpu:  # CPUs do not ask
        check_block_size(name, 48)


def packing(name: str, on_gpu: bool) -> None:
    """Whatever is to be written, the pages stay zero."""
    PageCodec(lambda key, value, pages: None, 32, 64, torch.float32, torch.device("cpu"))


def narrow_parts(name: str, on_gpu: bool) -> None:
    planning("ROCKETKV", on_gpu, 32, whole=224, group=12)


def fp8_without_avx512(name: str, on_gpu: bool) -> None:
    """At the start, and where a checkpoint has chosen it."""
    from vllm_sparse.backends.refusals import check_layer

    cache = {"kv_cache_dtype": "fp8", "expected_cache_dtype": "fp8"}
    check_layer(name, on_gpu, **{**PLAIN_LAYER, **cache})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked, "stock_reads_fp8", lambda: False)
        refused = 0
        for check in (
            lambda: check_layer(name, on_gpu, **{**PLAIN_LAYER, **cache}),
            lambda: startup.check_config(
                configuration(name, on_path({}, on_gpu), cache_config__cache_dtype="fp8")
            ),
        ):
            try:
                check()
            except UnsupportedError as error:
                refused, why = refused + 1, error
        assert refused in (0, 2)
        if refused:
            raise why


def unknown_projections(name: str, on_gpu: bool) -> None:
    config = configuration(name, on_path(AHEAD, on_gpu))
    config.model_config.hf_config.architectures = ["StrangeForCausalLM"]
    startup.check_config(config)


def untapped(name: str, on_gpu: bool) -> None:
    from vllm_sparse.backends.sparda_setup import _selector
    from vllm_sparse.config import load_settings

    config = configuration(name, on_path(AHEAD, on_gpu))
    settings = load_settings(config.additional_config, "sparda")
    layer = SimpleNamespace(impl=None, layer_name="layer.0")
    _selector(settings, None, torch.float32, [layer, layer], None, 1, torch.device("cpu"))


def sinks_flash_attention(name: str, on_gpu: bool) -> None:
    """This machine has no FlashAttention at all."""
    from vllm_sparse.backends.refusals import check_sinks

    if on_gpu:  # CPUs do not ask
        check_sinks(name)


BY_CHECK = {
    "windows": (windows, "sliding-window"),
    "own-backends": (own_backends, "CPU_ATTN whatever .* 1 of 3 of its layers"),
    "fp8-narrow": (fp8_without_avx512, "wants AVX-512 for it"),
    "states-cached": (states_cached, "--no-enable-prefix-caching"),
    "drafters-windows": (windows_and_drafter, "beside sliding windows"),
    "sinks-flash-attention": (sinks_flash_attention, "version None"),
    "flash-attention-4": (flash_attention_4, "flash_attn_version"),
    "triton-windows": (triton_windows, "which TRITON_ATTN does not allow"),
    "unlike-layers": (unlike_layers, "(2 and 4 query heads|3 of 4 layers)"),
    "other-blocks": (other_blocks, "from 32 to 48|blocks of 64 tokens, but .* 32"),
    "packing": (packing, "32 x 64 torch.float32"),
    "odd-blocks": (odd_blocks, "blocks of 48 tokens"),
    "narrow-parts": (narrow_parts, "parts of 32, where 7 of the 8 queries"),
    "unknown-projections": (unknown_projections, "StrangeForCausalLM.*selector to query"),
    "untapped": (untapped, "layer.0"),
}


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr(startup, "available_bytes", lambda: 1 << 30)
    monkeypatch.setattr(asked, "stock_reads_fp8", lambda: True)


def ask(feature: str, name: str, on_gpu: bool) -> None:
    """Ask a backend for a feature as start-up hears of it."""
    if feature in BY_CONFIGURATION:
        changes = dict(BY_CONFIGURATION[feature][0])
        settings = on_path(changes.pop("settings", {}), on_gpu)
        startup.check_config(configuration(name, settings, **changes))
    elif feature in BY_LAYER:
        from vllm_sparse.backends.refusals import check_layer

        check_layer(name, on_gpu, **{**PLAIN_LAYER, **BY_LAYER[feature][0]})
    elif feature in BY_CHECK:
        BY_CHECK[feature][0](name, on_gpu)


def names(feature: str, family: str) -> tuple[str, ...]:
    """Backends that can ask: a setting may be one backend's."""
    return ("ROCKETKV",) if feature == "page-sizes" else NAMES[family]


@cache
def written_in(file: str) -> dict[str, str]:
    """Tests of a file by name, as they are written."""
    found = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.unparse(node)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    found[f"{node.name}::{part.name}"] = ast.unparse(part)
    return found


def skips(text: str) -> bool:
    """Whether a test may leave itself out for a reason of its own."""
    return bool(re.search(r"importorskip|\bskip(if)?\(|xfail|mark\.skip", text))


def test_every_feature_can_be_asked_for():
    kinds = [BY_CONFIGURATION, BY_LAYER, BY_CHECK, BY_ENGINE, ALWAYS]
    assert sorted(name for kind in kinds for name in kind) == sorted(FEATURES)
    for name in ALWAYS:
        assert not any(isinstance(cell, Refused) for cell in FEATURES[name].cells.values())


@pytest.mark.parametrize("feature", sorted({*BY_CONFIGURATION, *BY_LAYER, *BY_CHECK}))
def test_what_is_refused_stops_the_start_and_nothing_else_does(feature):
    (words,) = (
        kind[feature][1] for kind in (BY_CONFIGURATION, BY_LAYER, BY_CHECK) if feature in kind
    )
    for family, on_gpu in PLACES:
        verdict = FEATURES[feature].verdict(family, on_gpu)
        for name in names(feature, family):
            if isinstance(verdict, Refused):
                with pytest.raises(UnsupportedError) as stopped:
                    ask(feature, name, on_gpu)
                said = str(stopped.value)
                fixed = re.split(r"\{\w+\}", verdict.reason)
                assert all(part in said for part in fixed), said
                assert re.search(words, said), said
                assert not re.search(r"\{\w+\}", said), said
            elif verdict is not None:
                ask(feature, name, on_gpu)


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_served_has_a_test(feature):
    cells = FEATURES[feature].cells.values()
    shown = [cell.test for cell in cells if isinstance(cell, Served | Stock)]
    for test in [*shown, *([BY_ENGINE[feature]] if feature in BY_ENGINE else [])]:
        file, _, name = test.partition("::")
        assert name in written_in(file), test
        assert not skips(written_in(file)[name]), test


@pytest.mark.parametrize(
    "line",
    [
        "pytest.skip('no')",
        "pytest.importorskip('x')",
        "@pytest.mark.skipif(True)",
        "pytest.xfail()",
    ],
)
def test_a_test_that_leaves_itself_out_shows_nothing(line):
    assert skips(line)
    assert not skips("run(skip_layers=1)  # fmt: skip")


def test_reasons_say_what_to_do():
    advice = re.compile(r"\b(use|remove|leave|choose|set|are served on CPUs|vllm_sparse\.)", re.I)
    for feature in FEATURES.values():
        for cell in feature.cells.values():
            # A layer's reasons end with "Leave out --attention-backend".
            if isinstance(cell, Refused) and feature.name not in BY_LAYER:
                assert advice.search(cell.reason), cell.reason


@pytest.mark.parametrize("method", ["ngram", "suffix", "custom_class"])
def test_a_gpus_path_is_a_gpus_interpreted_or_not(method):
    drafts = {"speculative_config": SimpleNamespace(method=method)}
    larger = {"max_token_budget": 4096}
    startup.check_config(configuration("ROCKETKV", larger, **drafts))
    for settings, room in (({}, lambda: 1 << 30), ({"kernels": "triton"}, None)):
        startup.check_config(configuration("ROCKETKV", settings, **drafts), room)
        with pytest.raises(UnsupportedError, match="on GPUs a captured graph"):
            startup.check_config(configuration("ROCKETKV", {**settings, **larger}), room)


def test_a_policy_of_another_package_is_served_as_ours_but_for_its_own_cells(monkeypatch):
    point = EntryPoint("LARGEKEYS", "support.outside:LargeKeys", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry.entries.cache_clear()
    try:
        for feature in sorted(set(BY_CONFIGURATION) - {"page-sizes"}):
            verdict = FEATURES[feature].verdict(OUTSIDE, False)
            if isinstance(verdict, Refused):
                with pytest.raises(UnsupportedError):
                    ask(feature, "LARGEKEYS", False)
            elif verdict is not None:
                ask(feature, "LARGEKEYS", False)
        assert isinstance(FEATURES["tier"].verdict(OUTSIDE, False), Refused)
    finally:
        monkeypatch.undo()
        registry.entries.cache_clear()


def test_adapters_refuse_by_the_table_alone():
    """Whoever raises by hand says something that the documentation does not know."""
    allowed = {("refusals.py", "check_layer"), ("startup.py", "check_config")}
    package = ROOT / "vllm_sparse"
    found = set()
    for path in [*(package / "backends").glob("*.py"), *package.glob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or path.name == "versions.py":
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and "UnsupportedError(" in ast.unparse(node):
                    found.add((path.name, function.name))
    assert found == allowed
