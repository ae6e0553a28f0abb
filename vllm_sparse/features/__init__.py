# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The one table of what is served and what is refused; start-up and the documentation read it.

To serve what is refused, change its cell from :class:`Refused` to :class:`Served`, naming the test
that shows it: start-up then lets it through, and ``make tables`` says so. What asks for a feature
is found in :mod:`vllm_sparse.backends.asked`.
"""

from __future__ import annotations

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.features import cache, models, serving
from vllm_sparse.features.verdicts import (
    OUTSIDE,
    POLICIES,
    SPARDA,
    Feature,
    Refused,
    Served,
    Stock,
    Untested,
    Verdict,
)

__all__ = [
    "FEATURES",
    "OUTSIDE",
    "POLICIES",
    "SPARDA",
    "Feature",
    "Refused",
    "Served",
    "Stock",
    "Untested",
    "Verdict",
    "reason",
    "refuse",
]

FEATURES = {row.name: row for row in (*models.ROWS, *cache.ROWS, *serving.ROWS)}


def reason(feature: str, family: str, on_gpu: bool, **facts: object) -> str:
    """Why a feature that is asked for is refused; empty if it is not.

    Args:
        feature: Name of a row.
        family: Of the backend.
        on_gpu: Steps take a GPU's path.
        **facts: Fill the reason.
    """
    verdict = FEATURES[feature].verdict(family, on_gpu)
    return verdict.reason.format(**facts) if isinstance(verdict, Refused) else ""


def refuse(feature: str, family: str, on_gpu: bool, **facts: object) -> None:
    """Stop the start if a feature that is asked for is refused.

    Args:
        feature: Name of a row.
        family: Of the backend.
        on_gpu: Steps take a GPU's path.
        **facts: Fill the reason.

    Raises:
        UnsupportedError: With the reason.
    """
    if why := reason(feature, family, on_gpu, **facts):
        raise UnsupportedError(why)
