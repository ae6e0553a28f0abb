# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The registry of kernel operations: inputs, reference, bytes to move, shapes.

`rocketkv` and `sparda` list them; `parity` compares each with its reference, `timings` times them,
`search` finds faster launches for them.
"""
