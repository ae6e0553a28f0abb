// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// What GCC's OpenMP runtime orders, told to ThreadSanitizer, which does not see how: that runtime is
// not instrumented. Linked into the kernels with --wrap for each of the three functions.

extern "C" {

void __tsan_acquire(void* address);
void __tsan_release(void* address);

void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void __real_GOMP_barrier();
void __real_GOMP_loop_end();

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  char begun, ended;
};

void run(void* given) {
  Region* region = static_cast<Region*>(given);
  __tsan_acquire(&region->begun);
  region->body(region->data);
  __tsan_release(&region->ended);
}

// One for all barriers: a thread that is already at the next one may order more than there is.
char arrived;

}  // namespace

void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  Region region{body, data, 0, 0};
  __tsan_release(&region.begun);
  __real_GOMP_parallel(run, &region, threads, flags);
  __tsan_acquire(&region.ended);
}

void __wrap_GOMP_barrier() {
  __tsan_release(&arrived);
  __real_GOMP_barrier();
  __tsan_acquire(&arrived);
}

void __wrap_GOMP_loop_end() {
  __tsan_release(&arrived);
  __real_GOMP_loop_end();
  __tsan_acquire(&arrived);
}
}
