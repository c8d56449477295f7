// Weight codes as a file holds them (export/packing.py): planes of 4, 2 and 1 bits, lowest bits first, low bits of a
// byte first; two's complement of `bits` bits. One-bit codes are -1 and +1, stored as 0 and 1.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace edgeqat {

struct Plane {
  const uint8_t* data;
  int64_t size;
};

inline std::vector<int> plane_widths(int bits) {
  if (bits < 1 || bits > 8) throw std::invalid_argument("weight codes have 1 to 8 bits");
  if (bits == 8) return {8};
  std::vector<int> widths;
  for (const int width : {4, 2, 1})
    if (bits & width) widths.push_back(width);
  return widths;
}

inline std::vector<int8_t> unpack(const std::vector<Plane>& planes, int bits, int64_t count) {
  const std::vector<int> widths = plane_widths(bits);
  if (planes.size() != widths.size())
    throw std::invalid_argument("has another number of weight planes than its bits need");
  for (size_t p = 0; p < planes.size(); ++p) {
    const int per_byte = 8 / widths[p];
    if (planes[p].size != (count + per_byte - 1) / per_byte)
      throw std::invalid_argument("has a weight plane of wrong size");
  }
  std::vector<uint8_t> raw(static_cast<size_t>(count), 0);  // only now: the planes show that there are so many
  int shift = 0;
  for (size_t p = 0; p < planes.size(); ++p) {
    const int width = widths[p], per_byte = 8 / width;
    for (int64_t i = 0; i < count; ++i) {
      const int part = planes[p].data[i / per_byte] >> (i % per_byte * width) & ((1 << width) - 1);
      raw[i] = uint8_t(raw[i] | part << shift);
    }
    shift += width;
  }
  std::vector<int8_t> codes(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    codes[i] = int8_t(bits == 1 ? 2 * raw[i] - 1 : raw[i] >= 1 << (bits - 1) ? raw[i] - (1 << bits) : raw[i]);
  return codes;
}

}  // namespace edgeqat
