// How many positions each slot holds: the executor keeps keys and values and no lengths. As runtime/slots.py.
#pragma once
#include <cstdint>
#include <vector>

namespace gristmill {

class Sequences {
 public:
  // ring: the fewest rows that a cache keeps of a slot; max_len where all keep all. reach: how far back a slot
  // can go once that ring has begun to overwrite itself.
  Sequences(int64_t slots, int64_t max_len, int64_t ring, int64_t reach);

  int64_t length(int64_t slot) const { return of(slot).length; }
  // Throws Error where `position` is beyond the slot's length or out of its reach.
  void check_start(int64_t slot, int64_t position) const;
  // What a forward of rows from `first` to `end` leaves, should it fail in the middle, and when it is done.
  void begin(int64_t slot, int64_t first, int64_t end);
  void advance(int64_t slot, int64_t first, int64_t end);
  void truncate(int64_t slot, int64_t length);
  void copied(int64_t from, int64_t to, int64_t length);

 private:
  struct Slot {
    int64_t length = 0, highest = 0;  // highest: the longest it was since it began at 0
  };
  const Slot& of(int64_t slot) const;
  Slot& of(int64_t slot);
  bool overwritten(const Slot& slot) const { return ring_ < max_len_ && slot.highest > ring_; }

  std::vector<Slot> slots_;
  int64_t max_len_, ring_, reach_;
};

}  // namespace gristmill
