# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies of a name."""

from __future__ import annotations

import pytest

from vllm_sparse import registry
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.policies.making import make_policy
from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention, Shape
from vllm_sparse.policies.snapkv import SnapKV


class InPlace(Policy):
    """Gives the first half of a prompt up, and reads the rest where it lies."""

    Settings = PolicySettings

    def retention(self, prompt_len):
        return Retention(True, prompt_len // self.shape.block_size // 2)


class Moved(InPlace):
    """What is kept lies elsewhere."""

    moves = True


@pytest.mark.parametrize("kind", [InPlace, Moved])
@pytest.mark.parametrize("skipped", [0, 2])
def test_no_layer_may_read_blocks_that_are_given_up(monkeypatch, kind, skipped):
    """Stock attention reads a request's whole block table, which still names them."""
    monkeypatch.setattr(registry, "policy", lambda name: kind)
    arguments = "NEW", PolicySettings(skip_layers=skipped), Shape(16, 2, 16, 2048)
    if kind is InPlace and skipped:
        with pytest.raises(UnsupportedError, match=r"skip_layers=2: .* that NEW gives up"):
            make_policy(*arguments)
    else:
        assert isinstance(make_policy(*arguments), kind)


class Unindexed(SnapKV):
    """Asks a window, whose queries have nowhere to wait."""

    index_width = 0


class Paged(InPlace):
    """Short prompts have pages of one size, long ones of another."""

    page_sizes = (4, 8)
    index_width = 32


class PagedAndMoved(Paged):
    """A tail is one request's."""

    moves = True


class Narrow(Moved):
    """Six numbers a page do not spread over four tokens."""

    page_sizes = (4, 8)
    index_width = 6


class Misnamed(Moved):
    """Its package has registered nothing."""

    kernel = "mine"


class FusedInPlace(InPlace):
    """Fused steps read plain pages."""

    kernel = "rocketkv"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            Narrow,
            r"NEW has an index_width of 6 numbers with heads of 16, .* smallest of "
            r"page_sizes=\[4, 8\].*Choose",
        ),
        (Misnamed, r"NEW names the fused step 'mine', but there are only \['rocketkv'\]: register"),
        (FusedInPlace, "NEW names the fused step 'rocketkv' but leaves tokens in place, .*leave"),
        (Unindexed, "NEW has a window of 32 tokens but no index: .* index_width"),
        (Paged, r"NEW has page_sizes=\[4, 8\] but leaves tokens in place: .* one size"),
        (PagedAndMoved, ""),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(monkeypatch, kind, reason):
    monkeypatch.setattr(registry, "policy", lambda name: kind)
    arguments = "NEW", kind.Settings(), Shape(16, 2, 16, 2048)
    if reason:
        with pytest.raises(UnsupportedError, match=reason):
            make_policy(*arguments)
    else:
        assert isinstance(make_policy(*arguments), kind)
