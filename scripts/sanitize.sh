#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
#
# Runs the tests of the C++ kernels with kernels that GCC's sanitizers watch, in build/sanitize:
# once with AddressSanitizer and UndefinedBehaviorSanitizer, once in four threads with ThreadSanitizer.
# Arguments replace the tests. Any report ends it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CXX=${CXX:-g++}
readonly KERNELS=(tests/kernels/test_{decode,fp8,growth,sinks}.py
    tests/kernels/test_sparda_{attention,choose,fp8,paging,prefill,select,tokens}.py)
tests=("$@")
[[ $# -gt 0 ]] || tests=("${KERNELS[@]}" tests/prefetch tests/kv/host)

runtime() {
    local found
    found=$("$CXX" -print-file-name="lib$1.so")
    [[ $found == /* ]] || { echo "sanitize: $CXX has no lib$1.so: not available"; exit 1; }
    # Exceptions of PyTorch's pass through it, so it must know the C++ runtime from the start.
    echo "$found:$("$CXX" -print-file-name=libstdc++.so.6)"
}

# Interpreted kernels have nothing to be watched; engines bring much that is not ours.
watched() {
    local preload=$1
    shift
    "$@" env VLLM_SPARSE_CACHE="$PWD/build/sanitize" LD_PRELOAD="$preload" \
        .venv/bin/python -m pytest -q -s -n 0 -p no:cacheprovider \
        -k "not triton" -m "not vllm and not model" "${tests[@]}"
}

common="-O1 -g1 -fno-omit-frame-pointer"
echo "sanitize: addresses, undefined behaviour"
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
VLLM_SPARSE_CXXFLAGS="$common -fsanitize=address,undefined -D_GLIBCXX_ASSERTIONS -D_GLIBCXX_SANITIZE_VECTOR" \
    watched "$(runtime asan)"

echo "sanitize: threads"
# At fixed addresses: ThreadSanitizer knows only some layouts of memory.
TSAN_OPTIONS=ignore_noninstrumented_modules=1:report_signal_unsafe=0:halt_on_error=1 \
VLLM_SPARSE_CXXFLAGS="$common -fsanitize=thread tests/support/openmp_tsan.cpp -Wl,--wrap=GOMP_parallel,--wrap=GOMP_barrier,--wrap=GOMP_loop_end" \
OMP_NUM_THREADS=4 OMP_WAIT_POLICY=passive \
    watched "$(runtime tsan)" setarch -R
