// Memory pages of large outputs.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

// Has the system provide the pages of an untouched range at once. One fault a page would come to
// cost more than a large gradient's arithmetic. A kernel that does not know the request ignores it.
// Ranges of few pages are left to their faults, which are cheaper than a request for each.
RK_FORMULA void populate_pages(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  if (bytes < size_t(64) << 10) return;
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
  madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(begin) + bytes - first,
          MADV_POPULATE_WRITE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace RK_ISA
}  // namespace rk
