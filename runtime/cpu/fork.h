// What a fork must not tear: objects that keep threads or locks hear of it in the child, before anything else
// runs there.
#pragma once
#include <mutex>

namespace gristmill {

// As the last member of an object: while it lives, `call(owner)` is called in the child of every fork.
class ForkListener {
 public:
  using Call = void (*)(void* owner) noexcept;
  ForkListener(void* owner, Call call);
  ~ForkListener();
  ForkListener(const ForkListener&) = delete;
  ForkListener& operator=(const ForkListener&) = delete;

 private:
  friend struct ForkList;
  void* owner_;
  Call call_;
  ForkListener* next_ = nullptr;
  ForkListener* previous_ = nullptr;
};

// Held around a fork; guards the process-wide tables (listeners, open mappings). Never held while work is
// done.
std::mutex& fork_mutex();

}  // namespace gristmill
