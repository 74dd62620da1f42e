// Integer division by zero, and of the least integer by -1: values that Metal leaves unspecified, without an exception
// (MSL specification, "Scalar and Vector Arithmetic"). x86-64 raises one, so its handler puts in what ARM computes: a
// quotient of 0 with the dividend as remainder, and the least integer with 0.
#include <stdint.h>
#include <ucontext.h>

#include "worker.h"

namespace rt {

#if defined(__x86_64__)
namespace {

struct Division {
  unsigned length, bits;
  bool is_signed;
};

// Prefixes, opcode F6 or F7 with /6 (div) or /7 (idiv), and a register or memory operand (Intel SDM, volume 2, chapter 2).
bool decode(const uint8_t* at, Division& division) {
  const uint8_t* begin = at;
  bool half = false, wide = false;
  for (; *at == 0x66 || (*at >= 0x40 && *at <= 0x4F); at++) half |= *at == 0x66, wide |= *at >= 0x48;
  uint8_t opcode = *at++, operand = *at++;
  unsigned mode = operand >> 6, which = operand >> 3 & 7, base = operand & 7;
  if ((opcode != 0xF6 && opcode != 0xF7) || which < 6) return false;
  if (mode != 3 && base == 4) base = *at++ & 7;               // the base of an address with an index
  at += mode == 1 ? 1 : mode == 2 || (mode == 0 && base == 5) ? 4 : 0;
  division = {unsigned(at - begin), opcode == 0xF6 ? 8u : wide ? 64u : half ? 16u : 32u, which == 7};
  return true;
}

// A write to half of a register of 32 bits clears the rest; to one of 16 or 8 bits it doesn't.
uint64_t put(uint64_t into, uint64_t value, unsigned bits) {
  uint64_t mask = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  return (bits == 32 ? 0 : into & ~mask) | (value & mask);
}

}  // namespace

bool skip_division(void* context) {
  auto* state = static_cast<ucontext_t*>(context);
#if defined(__APPLE__)
  auto &pc = state->uc_mcontext->__ss.__rip, &low = state->uc_mcontext->__ss.__rax, &high = state->uc_mcontext->__ss.__rdx;
#else
  auto* registers = state->uc_mcontext.gregs;
  auto &pc = registers[16], &low = registers[13], &high = registers[12];  // REG_RIP, REG_RAX, REG_RDX
#endif
  Division division;
  if (!decode(reinterpret_cast<const uint8_t*>(pc), division)) return false;
  unsigned bits = division.bits;
  uint64_t dividend = put(0, uint64_t(low), bits), least = uint64_t{1} << (bits - 1);
  bool overflow = division.is_signed && dividend == least;
  uint64_t quotient = overflow ? least : 0, remainder = overflow ? 0 : dividend;
  if (bits == 8) {                                            // both in ax
    low = decltype(low + 0)(put(uint64_t(low), quotient | remainder << 8, 16));
  } else {
    low = decltype(low + 0)(put(uint64_t(low), quotient, bits));
    high = decltype(high + 0)(put(uint64_t(high), remainder, bits));
  }
  pc += division.length;
  return true;
}
#else
bool skip_division(void*) { return false; }
#endif

}  // namespace rt
