#include "loops_of.hpp"

namespace edgeqat {

const Loops* portable_loops() { return &kLoops; }

}  // namespace edgeqat
