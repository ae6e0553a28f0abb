# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Registration, selection, refusal: how the plugin behaves as a guest of vLLM."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from support.configuration import configuration
from support.forked import run_forked

from vllm_sparse import backends, versions
from vllm_sparse.errors import ConfigError, UnsupportedError

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

_config = partial(configuration, "ROCKETKV")


def _run(code: str, **env: str) -> str:
    """What code prints where vLLM has been imported, but neither a platform nor a plugin."""
    return run_forked("support.code", code, env, 900, ("vllm",))


def test_our_modules_import_no_torch():
    code = (
        "import sys, vllm_sparse.plugin, vllm_sparse.config, vllm_sparse.cli\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'vllm' not in sys.modules, 'vllm'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registration_is_idempotent_and_any_case_parses():
    from vllm.config.attention import AttentionConfig

    from vllm_sparse.plugin import register

    register()
    register()
    for name in ("ROCKETKV", "rocketkv", "RocketKV"):
        assert AttentionConfig(backend=name).backend.name == "ROCKETKV"


def test_the_doctor_sees_what_vllm_has_loaded():
    from vllm_sparse.machine.probe import plugin_facts

    facts = plugin_facts()
    assert facts["missing"] == []
    assert facts["listens"]


def test_the_backend_survives_pickling_into_a_fresh_process():
    from vllm.config.attention import AttentionConfig

    from vllm_sparse.plugin import register

    register()
    payload = pickle.dumps(AttentionConfig(backend="ROCKETKV").backend)
    printed = _run(
        "import pickle, sys\n"
        "assert 'vllm_sparse.plugin' not in sys.modules\n"
        f"print(pickle.loads({payload!r}).name)"
    )
    assert printed.split()[-1] == "ROCKETKV", printed


@pytest.mark.parametrize("env", [{}, {"VLLM_TARGET_DEVICE": "cpu"}])
def test_the_cpu_platform_honours_the_backend(env):
    printed = _run(
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from types import SimpleNamespace as N\n"
        "from vllm.platforms import current_platform as p\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "c = lambda w: N(has_sliding_window=w, use_sparse=False, use_mla=False)\n"
        "print(p.get_attn_backend_cls(E.ROCKETKV, c(False)))\n"
        "print(p.get_attn_backend_cls(E.ROCKETKV, c(True)))\n"
        "print(p.get_attn_backend_cls(None, c(False)))\n",
        **env,
    )
    ours, windowed, unselected = printed.split()[-3:]
    assert ours.endswith("backends.ROCKETKV"), printed
    assert windowed.endswith("CPUAttentionBackend")
    assert unselected.endswith("CPUAttentionBackend")


def test_gpu_platforms_choose_for_themselves():
    """Apart from sliding-window layers, which stay stock beside ROCKETKV."""
    printed = _run(
        "from types import SimpleNamespace as N\n"
        "import vllm.platforms as platforms\n"
        "from vllm.platforms.interface import Platform, PlatformEnum\n"
        "class Gpu(Platform):\n"
        "    _enum = PlatformEnum.CUDA\n"
        "    @classmethod\n"
        "    def get_attn_backend_cls(cls, selected, *_):\n"
        "        return f'stock:{selected and selected.name}'\n"
        "platforms._current_platform = Gpu()\n"
        "from vllm_sparse.plugin import register; register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "choose = platforms.current_platform.get_attn_backend_cls\n"
        "print(choose(E.ROCKETKV, N(has_sliding_window=False, has_sink=False)))\n"
        "print(choose(E.ROCKETKV, N(has_sliding_window=True)))\n"
        "try:\n"
        "    choose(E.SPARDA, N(has_sliding_window=True))\n"
        "except Exception as error:\n"
        "    print('needs them all alike' in str(error))\n"
    )
    assert printed.split()[-3:] == ["stock:ROCKETKV", "stock:None", "True"], printed


@pytest.mark.parametrize("name", ["ROCKETKV", "SPARDA", "QUEST", "SNAPKV", "STREAMINGLLM"])
def test_gpu_platforms_accept_what_we_serve(monkeypatch, name):
    """What CUDA platforms ask a backend before they use it."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    backend = backends._backend(name, True)
    assert backend.get_name() == name
    config = _config()
    monkeypatch.setattr("vllm_sparse.backends.gpu.get_current_vllm_config", lambda: config)

    def reasons(major=9, **changes):
        asked = AttentionSelectorConfig(
            **{"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto",
               "block_size": None, **changes}
        )  # fmt: skip
        return backend.validate_configuration(
            device_capability=DeviceCapability(major, 0), **asked._asdict()
        )

    assert reasons() == reasons(block_size=64) == []
    for changes in ({"has_sliding_window": True}, {"kv_cache_dtype": "fp8"}, {"major": 7},
                    {"use_mla": True}, {"use_batch_invariant": True}):  # fmt: skip
        assert reasons(**changes), changes
    config.kv_transfer_config = Mock(kv_connector="any")
    assert "KV connectors" in reasons()[0]


@pytest.mark.parametrize(("asked", "taken", "size"), [(None, 16, 64), (32, 16, 32), (None, 48, 16)])
def test_gpu_platforms_take_the_blocks_that_ours_prefers(monkeypatch, asked, taken, size):
    """Beside windows, too, whose backend takes multiples of ``taken``; `asked` by the user."""
    from vllm.platforms.interface import Platform, PlatformEnum
    from vllm.v1.attention.backend import AttentionBackend, MultipleOf

    from vllm_sparse import platform

    class Windows(AttentionBackend):
        get_supported_kernel_block_sizes = staticmethod(lambda *_: [MultipleOf(taken)])

    class Gpu(Platform):
        _enum = PlatformEnum.CUDA
        _find_non_ssm_backends = staticmethod(
            lambda config: [Windows, backends._backend("ROCKETKV", True)]
        )

    config = _config()
    config.cache_config = Mock(
        DEFAULT_BLOCK_SIZE=16, block_size=asked or 16, user_specified_block_size=bool(asked)
    )
    monkeypatch.setattr("vllm_sparse.backends.gpu.get_current_vllm_config", lambda: config)
    platform._prefer_our_blocks(Gpu, config)
    assert config.cache_config.block_size == size


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_other_vllm_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    with pytest.raises(UnsupportedError, match=r">=0\.32,<0\.34"):
        versions.check_vllm_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cu130", "0.32.0+cpu"])
def test_supported_vllm_versions_pass(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    versions.check_vllm_version()


@pytest.mark.parametrize(("backend", "served"), [("ROCKETKV", True), ("SPARDA", False)])
def test_offloading_is_ours_or_refused_before_vllm_makes_a_connector_of_it(llama, backend, served):
    from vllm.engine.arg_utils import EngineArgs

    options = {"model": str(llama), "attention_backend": backend, "skip_tokenizer_init": True}
    options["additional_config"] = {"vllm_sparse": {} if served else {"host_gib": 0.1}}
    assert EngineArgs(**options).create_engine_config().kv_transfer_config is None
    if served:
        config = EngineArgs(**options, kv_offloading_size=0.5).create_engine_config()
        assert config.kv_transfer_config.kv_connector == "PrefixTierConnector"
        extra = config.kv_transfer_config.kv_connector_extra_config
        assert extra == {"cpu_bytes_to_use": 1 << 29}
    else:
        with pytest.raises(Exception, match="--kv-offloading-size"):
            EngineArgs(**options, kv_offloading_size=0.5).create_engine_config()


def test_a_guarded_combination_is_fine_with_another_backend():
    from vllm_sparse.startup import check_config

    check_config(_config(attention_config__backend=None, speculative_config=object()))


def test_wrong_settings_stop_the_start():
    from vllm_sparse.startup import check_config

    with pytest.raises(ConfigError, match=r"vllm_sparse\.budget"):
        check_config(_config(additional_config={"vllm_sparse": {"budget": 1}}))


def test_the_vllm_symbols_we_rely_on_exist():
    """A release that renames one shows here, by name, before anything else breaks."""
    import inspect

    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    assert {"customize_spec", "forward_includes_kv_cache_update"} <= set(dir(AttentionBackend))
    assert "rswa_prefix_lens" in CommonAttentionMetadata.__dataclass_fields__
    assert callable(AttentionBackendEnum.register)
    assert callable(KVCacheSpecRegistry._ensure_registered)
    assert "state_content_bytes" in FullAttentionSpec.__dataclass_fields__
    for name, parameters in {
        "cache_blocks": ["request", "num_tokens", "retention_interval", "replay_boundaries"],
        "find_longest_cache_hit": ["block_hashes", "max_length", "kv_cache_spec"],
        "remove_skipped_blocks": ["request_id", "processed_computed_tokens", "num_prompt_tokens"],
        "_remove_blocks_in_range": ["request_id", "first_block", "last_block"],
    }.items():
        signature = inspect.signature(getattr(FullAttentionManager, name))
        assert set(parameters) <= set(signature.parameters), name
