# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How the C++ kernels are compiled and kept, and what runs where they cannot be had."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.cpu import build

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def anew():
    """What is known of the compiler is forgotten, before and after."""
    known = build.load, dispatch.policy_cpu, dispatch.sparda_kernels
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


@pytest.fixture
def tiny(monkeypatch, tmp_path, anew):
    """Kernels that are compiled in no time, into a folder of their own, which is returned."""
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int vllm_sparse_threads() { return 77; }\n')
    monkeypatch.setattr(build, "_SOURCES", (source,))
    monkeypatch.setattr(build, "_ARGUMENTS", {"vllm_sparse_threads": ""})
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def stub(path, script):
    """A program that stands for a compiler."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_flags_of_the_environment_come_last_and_have_a_library_of_their_own(monkeypatch, tmp_path):
    compiler = stub(tmp_path / "compiler", 'printf "<%s>" "$@" >&2\nexit 1')
    plain = build.compiled_path(str(compiler))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(build.FLAGS_ENV, "-O1 -DNAME='a b'")
    assert build.compiled_path(str(compiler)) != plain
    with pytest.raises(build.KernelBuildError, match=r"<-O3>.*<-O1><-DNAME=a b></"):
        build.load.__wrapped__()


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/bin/false", "/bin/false failed"),
        ("/no/such/g++", r"'/no/such/g\+\+' cannot be run .* set CXX"),
        ("ccache-that-is-not-there g++", r"'ccache-that-is-not-there g\+\+' cannot.* set CXX"),
        ("g++ 'of one quote", "No closing quotation.* set CXX"),
    ],
)
def test_without_a_compiler_the_reference_runs_and_says_why(anew, monkeypatch, compiler, words):
    assert dispatch.policy_cpu().name == "cpu"
    for known in (build.load, dispatch.policy_cpu):
        known.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    kernels = dispatch.policy_cpu()
    assert kernels.name == "reference"
    assert re.search(words, kernels.note)


@needs_gcc
@pytest.mark.parametrize("compiler", ["env g++", "g++ -m64"])
def test_a_compiler_s_command_may_have_several_words(tiny, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert build.load().vllm_sparse_threads() == 77


@needs_gcc
def test_a_folder_that_cannot_be_written_is_named(tiny):
    tiny.parent.write_text("a file")
    with pytest.raises(build.KernelBuildError, match=f"{tiny}.* set VLLM_SPARSE_CACHE"):
        build.load()
    assert "VLLM_SPARSE_CACHE" in dispatch.policy_cpu().note


@needs_gcc
def test_half_of_a_library_is_compiled_anew(tiny):
    library = build.compiled_path(build.find_compiler())
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF")
    assert build.load().vllm_sparse_threads() == 77


def test_a_library_that_does_not_load_names_the_folder(tiny, monkeypatch, tmp_path):
    """What a file system does that forbids to execute its files."""
    writes = 'for last; do :; done\n[ $# = 1 ] || echo "no library" > "$last"'
    monkeypatch.setenv("CXX", str(stub(tmp_path / "compiler", writes)))
    with pytest.raises(build.KernelBuildError, match=r"cannot be loaded.* set VLLM_SPARSE_CACHE"):
        build.load()


def test_another_version_or_libc_has_a_library_of_its_own(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    paths = set()
    for version, libc in (("12.2", "2.36"), ("14.1", "2.36"), ("14.1", "2.41")):
        stub(compiler, f"echo {version}")
        monkeypatch.setattr(build.platform, "libc_ver", lambda libc=libc: ("glibc", libc))
        paths.add(build.compiled_path(str(compiler)))
    assert len(paths) == 3


def test_a_new_compiler_beside_an_old_one_is_taken(monkeypatch, tmp_path):
    """As on Ubuntu 22.04, whose g++ is 11."""
    monkeypatch.delenv("CXX", raising=False)
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    assert build.find_compiler() is None
    stub(folder / "g++", "echo 11")
    assert shlex.split(build.find_compiler()) == [str(folder / "g++")]
    stub(folder / "g++-13", "echo 13.2.0")
    assert shlex.split(build.find_compiler()) == [str(folder / "g++-13")]
    stub(folder / "g++", "exit 1")
    (folder / "g++").write_bytes(b"another machine's")
    assert shlex.split(build.find_compiler()) == [str(folder / "g++-13")]
    stub(folder / "g++", "echo 14.2.0")
    assert shlex.split(build.find_compiler()) == [str(folder / "g++")]
    monkeypatch.setenv("CXX", "g++-11 -m64")
    assert build.find_compiler() == "g++-11 -m64"


@needs_gcc
def test_an_old_compiler_says_what_is_needed(tiny, monkeypatch):
    header = Path(build.__file__).with_name("simd.h")
    (source,) = build._SOURCES
    source.write_text(f'#undef __GNUC__\n#define __GNUC__ 11\n#include "{header}"\n')
    with pytest.raises(build.KernelBuildError) as failed:
        build.load()
    assert "need GCC 12 or later" in str(failed.value)
    assert str(failed.value).count("error:") == 1


@needs_gcc
def test_threads_that_are_not_those_of_pytorch_are_warned_of(tiny, monkeypatch, caplog):
    """What clang++'s OpenMP runtime may give: one, where PyTorch's has those that vLLM pinned."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    build.load()
    assert not caplog.records
    build.load.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    build.load()
    (record,) = caplog.records
    assert "77 threads where PyTorch has 96" in record.getMessage()
    assert "g++" in record.getMessage()


def test_the_kernels_share_the_threads_of_pytorch():
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert build.load().vllm_sparse_threads() == count
    finally:
        torch.set_num_threads(before)
