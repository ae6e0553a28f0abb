# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What pyproject.toml cannot say: a build begins empty, and its version may name the commit."""

import os
import re
import shutil

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.egg_info import egg_info


class Build(build):
    """Else files that the sources no longer have would get from an older build into the wheel."""

    def run(self) -> None:
        """Builds."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class EggInfo(egg_info):
    """pip does not replace a version by a wheel of the same one."""

    def finalize_options(self) -> None:
        """Adds the commit."""
        commit = re.sub(r"[^a-z0-9]+", ".", os.environ.get("VLLM_SPARSE_COMMIT", "").lower())
        if commit.strip("."):
            self.tag_build = f"+g{commit.strip('.')}"
        super().finalize_options()


setup(cmdclass={"build": Build, "egg_info": EggInfo})
