#include "isa.hpp"
namespace edgeqat {
const Isa* neon_isa() { return nullptr; }
const Isa* neon_dotprod_isa() { return nullptr; }
}  // namespace edgeqat
