// Memory of torch's CPU tensors from 64 KiB on that is kept when they are freed, and given out again.
//
// malloc hands large blocks back to the kernel, which fills each page with zeros before the next step writes to it, and
// what it keeps it cuts into pieces with headers between, so that two halves of a map no longer fit where it was. Here
// the smallest free block that fits is taken, whole pages, and free neighbours become one.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr std::size_t kSmallestBytes = 64 << 10;
constexpr std::size_t kPageBytes = 4096;

class KeptMemory final : public c10::Allocator {
 public:
  KeptMemory(char* start, std::size_t size, c10::Allocator* other) : start_(start), size_(size), other_(other) {
    add_free(start, size);
  }

  c10::DataPtr allocate(std::size_t size) override {
    char* block = size >= kSmallestBytes && size <= size_ ? take((size + kPageBytes - 1) / kPageBytes * kPageBytes) : nullptr;
    if (block == nullptr) return other_->allocate(size);
    return {block, block, &KeptMemory::release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &KeptMemory::release; }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  static KeptMemory* instance;
  std::mutex mutex;

 private:
  static void release(void* pointer) {
    if (pointer == nullptr) return;
    char* block = static_cast<char*>(pointer);
    if (block >= instance->start_ && block < instance->start_ + instance->size_) {
      instance->give_back(block);
    } else {
      instance->other_->raw_deleter()(pointer);
    }
  }

  char* take(std::size_t size) {
    char* block;
    std::size_t total;
    {
      std::lock_guard<std::mutex> lock(mutex);
      auto found = by_size_.lower_bound({size, nullptr});
      if (found == by_size_.end()) return nullptr;
      auto [free_size, address] = *found;
      block = address;
      remove_free(block, free_size);
      if (free_size > size) add_free(block + size, free_size - size);
      taken_[block] = size;
      total = total_ += size;
    }
    c10::reportMemoryUsageToProfiler(block, static_cast<int64_t>(size), total, 0, c10::Device(c10::DeviceType::CPU));
    return block;
  }

  void give_back(char* block) {
    std::size_t size, total;
    {
      std::lock_guard<std::mutex> lock(mutex);
      auto found = taken_.find(block);
      size = found->second;
      taken_.erase(found);
      total = total_ -= size;
      char* first = block;
      std::size_t whole = size;
      auto after = by_address_.find(block + size);
      if (after != by_address_.end()) {
        whole += after->second;
        remove_free(after->first, after->second);
      }
      auto before = by_address_.lower_bound(block);
      if (before != by_address_.begin() && (--before)->first + before->second == block) {
        first = before->first;
        whole += before->second;
        remove_free(before->first, before->second);
      }
      add_free(first, whole);
    }
    c10::reportMemoryUsageToProfiler(block, -static_cast<int64_t>(size), total, 0, c10::Device(c10::DeviceType::CPU));
  }

  void add_free(char* block, std::size_t size) {
    by_address_[block] = size;
    by_size_.insert({size, block});
  }

  void remove_free(char* block, std::size_t size) {
    by_address_.erase(block);
    by_size_.erase({size, block});
  }

  char* start_;
  std::size_t size_;
  c10::Allocator* other_;
  std::map<char*, std::size_t> by_address_;  // free blocks; no two are neighbours
  std::set<std::pair<std::size_t, char*>> by_size_;
  std::unordered_map<char*, std::size_t> taken_;
  std::size_t total_ = 0;
};

KeptMemory* KeptMemory::instance = nullptr;

}  // namespace

// Whether from now on torch's large CPU tensors lie in kept memory. For smaller ones malloc keeps its own.
extern "C" int keep_memory() {
  if (KeptMemory::instance != nullptr) return 1;
  const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return 0;
  madvise(start, size, MADV_HUGEPAGE);
  KeptMemory::instance = new KeptMemory(static_cast<char*>(start), size, c10::GetCPUAllocator());
  pthread_atfork([] { KeptMemory::instance->mutex.lock(); }, [] { KeptMemory::instance->mutex.unlock(); },
                 [] { KeptMemory::instance->mutex.unlock(); });
  c10::SetCPUAllocator(KeptMemory::instance, 1);
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  return 1;
}
