# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What both backends take from a layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_sparse.errors import IntegrityError

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_scales_in_use_stay():
    """A builder is made twice; new weights may bring the same scales, and no others."""
    from vllm_sparse.backends.base import final_scales

    processed = []
    impl = SimpleNamespace(process_weights_after_loading=processed.append)
    layer = SimpleNamespace(impl=impl, layer_name="layer.0", _k_scale_float=0.5, _v_scale_float=2.0)
    for _ in range(2):
        scales = final_scales(layer, False)
    assert (scales.key, scales.value, scales.truncates) == (0.5, 2.0, False)
    impl.process_weights_after_loading(torch.bfloat16)
    assert processed == [torch.bfloat16]
    layer._v_scale_float = 0.37
    with pytest.raises(IntegrityError, match=r"layer\.0.*\(0\.5, 0\.37\).*runs with \(0\.5, 2\.0"):
        impl.process_weights_after_loading(torch.bfloat16)


def batch(ends, counts, prompts=None):
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return SimpleNamespace(
        num_reqs=len(ends), query_start_loc_cpu=starts, rswa_prefix_lens=prompts,
        seq_lens_cpu_upper_bound=torch.tensor(ends), seq_lens=None,
    )  # fmt: skip


def test_a_runner_that_says_no_prompt_lengths_is_noticed():
    """Of requests with a past; those of a dummy run have none."""
    from vllm_sparse.backends.base import prompt_lengths

    assert prompt_lengths(batch([3, 1], [3, 1])).tolist() == [0, 0]
    with pytest.raises(IntegrityError, match="how long prompts are"):
        prompt_lengths(batch([3, 2], [3, 1]))
    known = torch.tensor([2, 1])
    assert prompt_lengths(batch([3, 2, 0], [3, 1, 0], known)).tolist() == [2, 1, 0]
    assert prompt_lengths(batch([3], [3], known)).tolist() == [2]


def test_builders_of_stock_layers_do_not_see_what_ours_ask_for(monkeypatch):
    """Made after ours, as vLLM makes all of them twice; in a graph theirs would copy too much."""
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_sparse.backends.base import ask_for_prompt_lengths

    seen = []
    model = SimpleNamespace(rswa_window=None)
    config = SimpleNamespace(model_config=SimpleNamespace(model_arch_config=model))

    class Builder:
        requires_block_table_width = False

        def __init__(self, spec, names, vllm_config, device):
            seen.append(vllm_config.model_config.model_arch_config.rswa_window)

    class Ours(Builder):
        def __init__(self, *of):
            super().__init__(*of)
            ask_for_prompt_lengths(config)

    # What is replaced here is put back.
    monkeypatch.setattr(
        AttentionGroup, "create_metadata_builders", AttentionGroup.create_metadata_builders
    )
    for kind in (Builder, Ours, Builder, Ours, Builder):
        backend = SimpleNamespace(get_builder_cls=lambda kind=kind: kind)
        group = AttentionGroup(backend, ["layer"], SimpleNamespace(), 0)
        group.create_metadata_builders(vllm_config=config, device="cpu")
        assert type(group.metadata_builders[0]) is kind
    assert seen == [None] * 5
    assert model.rswa_window, "runners ask this"


@pytest.mark.parametrize("note", ["", "no C++ compiler found"])
def test_kernels_that_cannot_be_had_are_missed_at_start_up(monkeypatch, note):
    from vllm import logger

    from vllm_sparse.backends.base import warn_of_slow_kernels

    said = []
    monkeypatch.setattr(
        logger, "init_logger", lambda name: SimpleNamespace(warning_once=said.append)
    )
    warn_of_slow_kernels(note)
    assert [note in line for line in said] == [True] * bool(note)
