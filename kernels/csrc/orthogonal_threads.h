// Threads and memory of orthogonal.cpp, which includes it.
#pragma once

namespace {

// A team works on one matrix; most teams are one thread.
struct Team {
  int64_t size = 1;
  std::vector<std::atomic<int64_t>> next;  // one counter per phase
  std::atomic<int64_t> arrived{0}, generation{0};

  explicit Team(int64_t members, int64_t phases) : size(members), next(members > 1 ? phases : 0) {}

  void wait() {
    if (size == 1) return;
    int64_t now = generation.load();
    if (arrived.fetch_add(1) + 1 == size) {
      arrived = 0;
      generation = now + 1;
    } else {
      while (generation.load() == now) std::this_thread::yield();
    }
  }
};

// One thread's view: `each` runs f(0..n-1) once over the team, and ends when all of it is done.
struct Member {
  Team& team;
  int64_t phase = 0;

  template <class F>
  void each(int64_t n, F f) {
    if (team.size == 1) {
      for (int64_t i = 0; i < n; i++) f(i);
      return;
    }
    auto& next = team.next[phase++];
    for (int64_t i; (i = next.fetch_add(1)) < n;) f(i);
    team.wait();
  }
};

// Memory from a pool, since mapping fresh pages costs as much as some iterations.
class Arena {
 public:
  explicit Arena(size_t bytes) {
    bytes = (bytes + (2u << 20) - 1) >> 21 << 21;
    {
      std::lock_guard<std::mutex> hold(lock());
      auto& pool = free_list();
      for (size_t i = 0; i < pool.size(); i++)
        if (pool[i].size >= bytes) {
          block_ = pool[i];
          pool.erase(pool.begin() + (long)i);
          return;
        }
      if (!pool.empty()) {  // too small for this use: give it up rather than keep ever more of them
        std::free(pool.back().data);
        pool.pop_back();
      }
    }
    block_ = {std::aligned_alloc(2u << 20, bytes), bytes};
  }
  ~Arena() {
    std::lock_guard<std::mutex> hold(lock());
    if (block_.data && block_.size <= (64u << 20) && free_list().size() < 4)
      free_list().push_back(block_);
    else
      std::free(block_.data);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool ok() const { return block_.data != nullptr; }
  uint32_t* data() const { return (uint32_t*)block_.data; }

 private:
  struct Block {
    void* data = nullptr;
    size_t size = 0;
  };
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static std::vector<Block>& free_list() {
    static std::vector<Block> blocks;
    return blocks;
  }
  Block block_;
};

}  // namespace
