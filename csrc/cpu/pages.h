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

constexpr int64_t kPage = int64_t(2) << 20;  // a huge page on most machines

// One fault for every 4 kB of large new memory can cost more than the arithmetic on it. Systems that
// lack a request ignore it.
RK_FORMULA void ask_for_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t first = (reinterpret_cast<int64_t>(begin) + kPage - 1) / kPage * kPage;
  const int64_t end = (reinterpret_cast<int64_t>(begin) + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), size_t(end - first), MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

// An output whose memory has not been touched yet. The system clears its pages, so one is best
// provided just before it is written, while it is in the cache; where pages are small, those of two
// megabytes at a time.
class FreshPages {
 public:
  FreshPages(void* begin, int64_t bytes)
      : begin_(reinterpret_cast<int64_t>(begin)), end_((begin_ + bytes) / kPage * kPage) {
    ask_for_huge_pages(begin, bytes);
  }

  // Provides the pages that begin at these bytes of the output. Threads that take neighbouring bytes
  // so never clear the same page twice.
  void provide(int64_t from, int64_t to) const {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    int64_t page = (begin_ + from + kPage - 1) / kPage * kPage;
    for (; page < begin_ + to && page < end_; page += kPage) {
      madvise(reinterpret_cast<void*>(page), kPage, MADV_POPULATE_WRITE);
    }
#else
    (void)from, (void)to;
#endif
  }

 private:
  int64_t begin_, end_;
};

}  // namespace RK_ISA
}  // namespace rk
