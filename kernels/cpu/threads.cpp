// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Which OpenMP runtime these kernels got: another one than PyTorch's would not know its threads.

#include <omp.h>

extern "C" int vllm_sparse_threads() { return omp_get_max_threads(); }
