# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Draws every picture of the results into ``docs/images`` (``make report``).

Result files stay as they are; what a picture was drawn from stands in its metadata, and a test
says when it is older than its data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.pictures import generations, memory, quality, speed

PICTURES = (
    quality.policies, quality.windows, speed.speed, speed.serving, speed.prompts,
    speed.overlap, speed.waits, memory.device_bytes, memory.growth, memory.capacity,
    generations.held, generations.steps,
)  # fmt: skip
FOLDER = Path(__file__).parents[2] / "docs/images"


def main(arguments: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: docs/images)")
    options = parser.parse_args(arguments)
    try:
        from benchmarks.pictures.draw import svg
    except ImportError as error:
        print(f"{error}; pictures need: pip install '.[report]'", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for make in PICTURES:
        picture = make()
        path = options.out / f"{picture.name}.svg"
        path.write_text(svg(picture))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
