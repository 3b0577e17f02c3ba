#include "sequences.h"

#include <algorithm>

#include "error.h"

namespace gristmill {

Sequences::Sequences(int64_t slots, int64_t max_len, int64_t ring, int64_t reach)
    : slots_(static_cast<size_t>(slots)), max_len_(max_len), ring_(ring), reach_(reach) {}

const Sequences::Slot& Sequences::of(int64_t slot) const {
  const auto count = static_cast<int64_t>(slots_.size());
  if (slot < 0 || slot >= count)
    fail("got slot ", slot, ", expected 0 to ", count - 1, "; open with more max_slots");
  return slots_[static_cast<size_t>(slot)];
}
Sequences::Slot& Sequences::of(int64_t slot) {
  return const_cast<Slot&>(static_cast<const Sequences*>(this)->of(slot));
}

void Sequences::check_start(int64_t number, int64_t position) const {
  const Slot& slot = of(number);
  if (position < 0 || position > slot.length)
    fail("slot ", number, " holds ", slot.length, " positions, got position ", position, "; go on at ",
         slot.length, " or before");
  if (overwritten(slot) && position > 0 && position < slot.highest - reach_)
    fail("slot ", number, " cannot go back from ", slot.highest, " to ", position,
         ": its sliding window has moved on; begin again at position 0");
}

void Sequences::begin(int64_t number, int64_t first, int64_t end) {
  Slot& slot = of(number);
  slot.length = first;
  slot.highest = std::max(slot.highest, end);
}

void Sequences::advance(int64_t number, int64_t first, int64_t end) {
  Slot& slot = of(number);
  slot.length = end;
  slot.highest = first == 0 ? end : std::max(slot.highest, end);
}

void Sequences::truncate(int64_t number, int64_t length) {
  check_start(number, length);
  Slot& slot = of(number);
  slot.length = length;
  if (length == 0) slot.highest = 0;
}

void Sequences::copied(int64_t from, int64_t to, int64_t length) {
  const Slot& source = of(from);
  of(to) = {length, overwritten(source) ? source.highest : length};
}

}  // namespace gristmill
