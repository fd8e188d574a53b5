// Memory pages of large outputs.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

// Has the system provide the pages of a large untouched range before it is written: huge ones where
// it gives them on request, and a request for 2 MB of them at a time elsewhere. One fault for every
// 4 kB would come to cost more than a large gradient's arithmetic. Threads take aligned blocks, as
// two that touch one huge page at a time both clear it. Systems that lack a request ignore it.
RK_FORMULA void provide_pages(void* begin, size_t bytes, int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kBlock = uintptr_t(2) << 20;  // a huge page on most machines
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kBlock - 1) / kBlock;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) / kBlock;
  if (first >= end) return;
  madvise(reinterpret_cast<void*>(first * kBlock), (end - first) * kBlock, MADV_HUGEPAGE);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (uintptr_t block = first; block < end; ++block) {
    madvise(reinterpret_cast<void*>(block * kBlock), kBlock, MADV_POPULATE_WRITE);
  }
#else
  (void)begin, (void)bytes, (void)threads;
#endif
}

}  // namespace RK_ISA
}  // namespace rk
