# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Forecast: projections that tell, a layer ahead, which blocks a layer will read."""
