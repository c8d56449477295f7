#include "loops_of.hpp"

namespace edgeqat {

const Loops* avx512_loops() {
#if defined(__AVX512BW__)
  return &kLoops;
#else
  return portable_loops();
#endif
}

}  // namespace edgeqat
