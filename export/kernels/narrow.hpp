// How many steps of a sum fit 16 bits, proven by a layer's own weights.
//
// A step adds w0·x0 + w1·x1 to a 16-bit lane, codes 0 <= x <= h. Any n neighbouring steps add at most h · Σ max(w, 0)
// and at least -h · Σ max(-w, 0), whatever the codes; where both stay within 32 767 for every n neighbours, a lane that
// is emptied every n steps never wraps, and neither does the saturating addition inside a step. Weights of both signs
// and small ones leave far more room than the largest weight times the largest code does.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace edgeqat {

constexpr int64_t kLargestNarrow = 32767;
constexpr int kMostSteps = 1 << 20;

// The weights of one output channel, added step by step; a quad's first two and last two go to lanes of their own.
class NarrowProof {
 public:
  NarrowProof(int64_t steps, int64_t highest_code) : budget_(kLargestNarrow / highest_code) {
    for (auto& lane : sums_) lane.assign(size_t(steps), 0);
  }

  void add(int64_t step, int64_t place, int weight) {
    auto& lane = sums_[2 * (place / 2) + (weight < 0)];
    lane[size_t(step)] += weight < 0 ? -weight : weight;
  }

  // The largest number of neighbouring steps that always fit; 0: not even one does.
  int steps() const {
    int found = kMostSteps;
    for (const auto& lane : sums_) found = std::min(found, longest(lane));
    return found;
  }

 private:
  // One less than the shortest stretch that is beyond the budget.
  int longest(const std::vector<int64_t>& lane) const {
    int64_t shortest = kMostSteps + 1, sum = 0;
    for (size_t first = 0, last = 0; last < lane.size(); ++last) {
      sum += lane[last];
      while (sum > budget_) {
        shortest = std::min(shortest, int64_t(last - first + 1));
        sum -= lane[first++];
      }
    }
    return int(shortest - 1);
  }

  int64_t budget_;
  std::vector<int64_t> sums_[4];  // per lane: of positive weights, of negative ones
};

}  // namespace edgeqat
