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

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)
#define RK_ASKS_FOR_PAGES
#endif

// An output whose memory has not been touched yet. One fault for every 4 kB would come to cost more
// than a large gradient's arithmetic: huge pages are asked for, and all of one at a time where there
// are none. The system clears them, so a page is best provided just before it is written, while it
// is in the cache. Systems that lack a request ignore it.
class FreshPages {
 public:
  FreshPages(void* begin, int64_t bytes)
      : begin_(reinterpret_cast<int64_t>(begin)),
        first_((begin_ + kPage - 1) / kPage * kPage),
        end_((begin_ + bytes) / kPage * kPage) {
#ifdef RK_ASKS_FOR_PAGES
    if (first_ < end_) madvise(reinterpret_cast<void*>(first_), end_ - first_, MADV_HUGEPAGE);
#endif
  }

  // Provides the pages that begin at these bytes of the output. Threads that take neighbouring bytes
  // so never clear the same page twice.
  void provide(int64_t from, int64_t to) const {
#ifdef RK_ASKS_FOR_PAGES
    int64_t page = (begin_ + from + kPage - 1) / kPage * kPage;
    for (; page < begin_ + to && page < end_; page += kPage) {
      madvise(reinterpret_cast<void*>(page), kPage, MADV_POPULATE_WRITE);
    }
#else
    (void)from, (void)to;
#endif
  }

 private:
  int64_t begin_, first_, end_;
};

}  // namespace RK_ISA
}  // namespace rk
