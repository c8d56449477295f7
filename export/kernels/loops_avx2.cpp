#include "loops_of.hpp"

namespace edgeqat {

const Loops* avx2_loops() {
#if defined(__AVX2__) && defined(__FMA__)
  return &kLoops;
#else
  return portable_loops();
#endif
}

}  // namespace edgeqat
