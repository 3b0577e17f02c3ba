#include "fork.h"

#include <pthread.h>

namespace gristmill {

struct ForkList {
  std::mutex mutex;
  ForkListener* first = nullptr;

  ForkList() {
    pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); }, [] { get().tell_child(); });
  }
  // Never destroyed: executors may outlive the end of main().
  static ForkList& get() {
    static ForkList* const list = new ForkList;
    return *list;
  }
  void tell_child() {
    for (ForkListener* object = first; object; object = object->next_) object->call_(object->owner_);
    mutex.unlock();
  }
  void add(ForkListener* object) {
    const std::lock_guard<std::mutex> lock(mutex);
    object->next_ = first;
    if (first) first->previous_ = object;
    first = object;
  }
  void remove(ForkListener* object) {
    const std::lock_guard<std::mutex> lock(mutex);
    (object->previous_ ? object->previous_->next_ : first) = object->next_;
    if (object->next_) object->next_->previous_ = object->previous_;
  }
};

ForkListener::ForkListener(void* owner, Call call) : owner_(owner), call_(call) { ForkList::get().add(this); }
ForkListener::~ForkListener() { ForkList::get().remove(this); }
std::mutex& fork_mutex() { return ForkList::get().mutex; }

}  // namespace gristmill
