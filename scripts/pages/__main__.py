# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``python -m scripts.pages`` writes the tables of README.md and docs/ anew."""

from __future__ import annotations

from scripts.pages import fill

if __name__ == "__main__":
    for changed in fill.rewrite():
        print(f"wrote {changed}")
