# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Errors a user can meet, each saying what is wrong, why, and what to do."""


class VllmSparseError(Exception):
    """Base class of every error that vllm-sparse raises on purpose."""


class ConfigError(VllmSparseError, ValueError):
    """The settings are malformed or contradict each other."""


class UnsupportedError(VllmSparseError, NotImplementedError):
    """The model or vLLM configuration cannot be served by the chosen backend."""


class IntegrityError(VllmSparseError, RuntimeError):
    """A step would read what it should not: bookkeeping, or vLLM, contradicts itself."""


class RequestError(VllmSparseError, ValueError):
    """What a request asks for cannot be had; the request is refused before it reaches a worker."""
