// Memory of values that a plan computes on its way: what is freed is given out again within the same run. The system
// would map large blocks anew each time, and take a page fault for every 4 kB of them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <map>
#include <memory>
#include <mutex>

namespace mq_ao {

// Serves the operators that this thread calls while the object lives; blocks that are still held then live on.
class Workspace {
 public:
  Workspace() : outer_(current()), blocks_(std::make_shared<Blocks>()) { current() = this; }
  ~Workspace() {
    current() = outer_;
    blocks_->close();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Memory for `bytes`, from the workspace of this thread if there is one and it is worth it.
  static at::DataPtr memory(size_t bytes) { return allocator().allocate(bytes); }

  // What `at::empty` gives, likewise.
  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    if (!current()) return at::empty(sizes, options);
    constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
    return at::detail::empty_generic(sizes, &allocator(), kCpu, c10::typeMetaToScalarType(options.dtype()), std::nullopt);
  }

 private:
  static constexpr size_t kLeast = 64 << 10;  // smaller blocks are kept by malloc itself

  class Blocks;

  struct Block {
    explicit Block(size_t bytes) : data(c10::alloc_cpu(bytes)) {}
    ~Block() { c10::free_cpu(data); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    void* data;
    std::shared_ptr<Blocks> owner;  // while the block is in use
    size_t size = 0;
  };

  class Blocks {
   public:
    std::unique_ptr<Block> take(size_t bytes) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = free_.lower_bound(bytes);
        if (found != free_.end() && found->first <= 2 * bytes) {
          std::unique_ptr<Block> block = std::move(found->second);
          free_.erase(found);
          return block;
        }
      }
      auto block = std::make_unique<Block>(bytes);
      block->size = bytes;
      return block;
    }

    void give_back(std::unique_ptr<Block> block) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!open_) return;
      const size_t size = block->size;
      free_.emplace(size, std::move(block));
    }

    void close() {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
      free_.clear();
    }

   private:
    std::mutex mutex_;
    std::multimap<size_t, std::unique_ptr<Block>> free_;
    bool open_ = true;
  };

  // One for all workspaces, and for ever: tensors remember who allocated them.
  struct Allocator final : c10::Allocator {
    at::DataPtr allocate(size_t bytes) override {
      Workspace* workspace = current();
      if (!workspace || bytes < kLeast) return c10::GetCPUAllocator()->allocate(bytes);
      std::unique_ptr<Block> block = workspace->blocks_->take(bytes);
      block->owner = workspace->blocks_;
      void* data = block->data;
      return {data, block.release(), release, at::Device(at::kCPU)};
    }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  };

  static void release(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    const std::shared_ptr<Blocks> owner = std::move(block->owner);
    owner->give_back(std::move(block));
  }

  static Allocator& allocator() {
    static Allocator one;
    return one;
  }

  static Workspace*& current() {
    static thread_local Workspace* workspace = nullptr;
    return workspace;
  }

  Workspace* outer_;
  std::shared_ptr<Blocks> blocks_;
};

inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return Workspace::empty(sizes, options);
}

}  // namespace mq_ao
