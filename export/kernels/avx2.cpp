#include "isa.hpp"
namespace edgeqat {
const Isa* avx2_isa() { return nullptr; }
}  // namespace edgeqat
