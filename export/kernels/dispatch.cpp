// Which instruction set runs: the widest that was built and that the processor has, unless EDGEQAT_ISA names another.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.hpp"

namespace edgeqat {

const Isa* isa_named(const char* name) {
  for (const Isa* isa :
       {avx512_isa(), avxvnni_isa(), avx2_isa(), neon_i8mm_isa(), neon_dotprod_isa(), neon_isa(), portable_isa()})
    if (isa && std::strcmp(isa->name, name) == 0) return isa;
  return nullptr;
}

namespace {

const Isa& choose() {
  const char* wanted = std::getenv("EDGEQAT_ISA");
  if (wanted && *wanted) {
    if (const Isa* isa = isa_named(wanted)) return *isa;
    throw std::invalid_argument(std::string("EDGEQAT_ISA=") + wanted + ": unknown, or this processor cannot run it");
  }
  for (const Isa* isa : {avx512_isa(), avxvnni_isa(), avx2_isa(), neon_i8mm_isa(), neon_dotprod_isa(), neon_isa()})
    if (isa) return *isa;
  return *portable_isa();
}

}  // namespace

// Chosen once: a virtual machine takes microseconds to say what its processor can do, and nodes ask at every run.
const Isa& chosen_isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace edgeqat
