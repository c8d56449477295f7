// Random and extreme layers against the definition, written out loop by loop; no ONNX Runtime. Built by
// tools/sweep_kernels.py for any instruction set, sanitizer or processor; not part of the library.
//
//   sweep COUNT [ISA] [SEED]     exit 0: every code of every layer is the defined one
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "pointwise.hpp"

namespace {

using edgeqat::LayerSpec;
using edgeqat::LayerTensors;

std::mt19937 generator;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }
template <typename T>
T pick(std::initializer_list<T> of) {
  return of.begin()[uniform(0, int(of.size()) - 1)];
}

struct Case {
  LayerSpec spec;
  int64_t batch, height, width;
  bool residual, own, real_output;
  int other_code = -1;  // of the whole second summand; -1: any
  std::vector<uint8_t> x, other;
};

// Shapes that meet every kernel: tails of 4, 16 and 64 channels, depthwise, groups, one bit, 3×3 of stride 1
// (Winograd).
void choose_shape(Case& c) {
  auto& s = c.spec;
  const int kind = uniform(0, 5);
  s.inputs = pick({1, 2, 3, 5, 8, 15, 16, 17, 24, 32, 33, 48, 63, 64, 65, 70, 96, 130});
  s.outputs = pick({1, 3, 10, 16, 17, 31, 32, 40, 48, 63, 64, 65, 80, 100, 128, 129});
  if (kind == 0) s.groups = s.outputs = s.inputs;
  if (kind == 1) {
    s.groups = pick({2, 3, 4});
    s.inputs = s.groups * pick({1, 3, 4, 7, 16, 20});
    s.outputs = s.groups * pick({1, 2, 5, 16, 18, 66});
  }
  for (int axis = 0; axis < 2; ++axis) {
    s.window.kernel[axis] = kind == 2 ? 3 : pick({1, 1, 2, 3, 3, 5, 7});
    s.window.stride[axis] = kind == 2 ? 1 : pick({1, 1, 2, 3});
    s.window.dilation[axis] = kind == 2 ? 1 : pick({1, 1, 1, 2, 3});
    for (int end = 0; end < 2; ++end) s.window.pads[axis + 2 * end] = uniform(0, int(s.window.kernel[axis] / 2) + 1);
  }
  if (kind == 3) s.inputs = pick({32, 64, 96, 160}), s.groups = 1;
  c.batch = pick({1, 1, 2, 3});
  do {
    c.height = uniform(1, 19);
    c.width = uniform(1, 19);
  } while (s.window.outputs(0, c.height) < 1 || s.window.outputs(1, c.width) < 1);
  s.one_bit = kind == 3 && uniform(0, 1);
}

// extreme: every code and weight at an end of its range, where sums are largest.
void choose_values(Case& c) {
  auto& s = c.spec;
  const int weight_bits = s.one_bit ? 1 : uniform(1, 8), input_bits = uniform(1, 8), pattern = uniform(0, 4);
  s.input_high = s.one_bit ? 254 : (1 << input_bits) - 1;
  s.input_zero = s.one_bit ? 127 : pick({0, int(s.input_high), (int(s.input_high) + 1) / 2});
  const int highest = weight_bits == 1 ? 1 : (1 << (weight_bits - 1)) - 1,
            lowest = weight_bits == 1 ? -1 : -highest - 1;
  const int most = weight_bits == 8 ? 1 : 127 >> (weight_bits - 1);
  s.weight_multiplier = s.one_bit ? 64 : uniform(1, most);
  if (weight_bits == 1) s.weight_multiplier = std::min<int64_t>(s.weight_multiplier, 64);
  const int64_t depth = s.inputs / s.groups * s.window.kernel[0] * s.window.kernel[1];
  for (int64_t i = 0; i < s.outputs * depth; ++i) {
    const int code = pattern == 1   ? highest
                     : pattern == 2 ? lowest
                     : pattern == 3 ? (i % 2 ? highest : lowest)
                                    : uniform(lowest, highest);
    s.codes.push_back(int8_t(weight_bits == 1 ? (code > 0 ? 1 : -1) : code));
  }
  const float typical =
      1.0f / (float(s.weight_multiplier) * std::sqrt(float(depth)) * float(highest) * float(s.input_high));
  for (int64_t o = 0; o < s.outputs; ++o) {
    s.bias.push_back(uniform(-(1 << uniform(1, 20)), 1 << uniform(1, 20)));
    s.multiplier.push_back(real(-2.0f, 2.0f) * typical * 255.0f);
  }
  c.x.resize(size_t(c.batch * c.height * c.width * s.inputs));
  for (size_t i = 0; i < c.x.size(); ++i) {
    const int code = pattern == 0   ? uniform(0, int(s.input_high))
                     : pattern == 4 ? (i % 3 ? 0 : int(s.input_high))
                                    : int(s.input_high);
    c.x[i] = uint8_t(s.one_bit ? (code > 127 ? 254 : 0) : code);
  }
}

void choose_epilogue(Case& c) {
  auto& e = c.spec.epilogue;
  e.low = uniform(0, 40);
  e.high = uniform(e.low, 255);
  e.zero = pick({0, 8, 128, 254, 255});
  c.residual = uniform(0, 1) != 0;
  c.own = uniform(0, 3) != 0;
  c.real_output = uniform(0, 9) == 0;
  e.other_first = uniform(0, 1);
  e.ratio_first = real(0.1f, 2.0f);
  e.ratio_second = real(0.1f, 2.0f);
  e.offset = real(-150.0f, 100.0f);
  e.sum_low = uniform(0, 20);
  e.sum_high = uniform(e.sum_low, 255);
  if (c.residual && uniform(0, 2) == 0) {  // sums a hair beside a tie, which only a fused multiply-add tells from one
    const int code = uniform(1, 255);
    c.other_code = code;
    e.low = e.zero = 0;
    e.high = 3;
    (e.other_first ? e.ratio_second : e.ratio_first) = 0.5f;
    const float ratio = e.other_first ? e.ratio_first : e.ratio_second;
    e.offset = -(float(code) * ratio);
    e.sum_low = 0;
    e.sum_high = 255;
  }
  e.tables = uniform(0, edgeqat::kMaxTables);
  for (int i = 0; i < 256 * e.tables; ++i) c.spec.tables.push_back(uint8_t(uniform(0, 255)));
}

int64_t defined_sum(const Case& c, int64_t n, int64_t y, int64_t x, int64_t o) {
  const auto& s = c.spec;
  const auto& w = s.window;
  const int64_t inputs = s.inputs / s.groups, first = o / (s.outputs / s.groups) * inputs;
  int64_t sum = 0;
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t ky = 0; ky < w.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
        const int64_t in_y = y * w.stride[0] - w.pads[0] + ky * w.dilation[0];
        const int64_t in_x = x * w.stride[1] - w.pads[1] + kx * w.dilation[1];
        if (in_y < 0 || in_y >= c.height || in_x < 0 || in_x >= c.width) continue;
        const int64_t code = c.x[((n * c.height + in_y) * c.width + in_x) * s.inputs + first + i];
        sum += (code - s.input_zero) * s.codes[((o * inputs + i) * w.kernel[0] + ky) * w.kernel[1] + kx];
      }
  return sum * s.weight_multiplier + s.bias[o];
}

double clip(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

bool differs(const Case& c, const edgeqat::Isa& isa, const std::vector<uint8_t> got[],
             const std::vector<float>& reals) {
  const auto& e = c.spec.epilogue;
  const int64_t out_h = c.spec.window.outputs(0, c.height), out_w = c.spec.window.outputs(1, c.width);
  int64_t wrong = 0, at = 0;
  for (int64_t n = 0; n < c.batch; ++n)
    for (int64_t y = 0; y < out_h; ++y)
      for (int64_t x = 0; x < out_w; ++x)
        for (int64_t o = 0; o < c.spec.outputs; ++o, ++at) {
          const float value = float(defined_sum(c, n, y, x, o)) * c.spec.multiplier[o];
          if (c.real_output) {
            wrong += std::memcmp(&reals[at], &value, 4) != 0;
            continue;
          }
          int code = int(clip(std::nearbyint(double(value)) + e.zero, e.low, e.high));
          if (c.own || !c.residual) wrong += got[0][at] != code;
          if (c.residual) {
            const double a = e.other_first ? c.other[at] : code, b = e.other_first ? code : c.other[at];
            const float inner = float(b * double(e.ratio_second) + double(e.offset));
            const float sum = float(a * double(e.ratio_first) + double(inner));
            code = int(clip(std::nearbyint(double(sum)), e.sum_low, e.sum_high));
            wrong += got[1][at] != code;
          }
          for (int t = 0; t < e.tables; ++t) wrong += got[2 + t][at] != c.spec.tables[256 * t + code];
        }
  if (wrong == 0) return false;
  const auto& s = c.spec;
  const auto& w = s.window;
  std::printf(
      "%s: %lld wrong: image %lldx%lldx%lldx%lld, %lld outputs, %lld groups, kernel %lldx%lld, stride %lldx%lld, "
      "dilation "
      "%lldx%lld, one bit %d, input 0..%lld zero %lld, weight_multiplier %lld, residual %d, real %d\n",
      isa.name, (long long)wrong, (long long)c.batch, (long long)c.height, (long long)c.width, (long long)s.inputs,
      (long long)s.outputs, (long long)s.groups, (long long)w.kernel[0], (long long)w.kernel[1], (long long)w.stride[0],
      (long long)w.stride[1], (long long)w.dilation[0], (long long)w.dilation[1], s.one_bit, (long long)s.input_high,
      (long long)s.input_zero, (long long)s.weight_multiplier, c.residual, c.real_output);
  return true;
}

bool run_case(const edgeqat::Isa& isa) {
  Case c;
  choose_shape(c);
  choose_values(c);
  choose_epilogue(c);
  const auto& s = c.spec;
  const size_t size = size_t(c.batch * s.window.outputs(0, c.height) * s.window.outputs(1, c.width) * s.outputs);
  for (size_t i = 0; i < size; ++i) c.other.push_back(uint8_t(c.other_code < 0 ? uniform(0, 255) : c.other_code));
  std::vector<uint8_t> got[2 + edgeqat::kMaxTables];
  std::vector<float> reals(size);
  for (auto& g : got) g.resize(size);
  LayerTensors t;
  t.x = c.x.data();
  t.batch = c.batch;
  t.height = c.height;
  t.width = c.width;
  if (c.real_output) {
    t.real = reals.data();
  } else {
    t.other = c.residual ? c.other.data() : nullptr;
    t.own = c.own || !c.residual ? got[0].data() : nullptr;
    t.sum = got[1].data();
    for (int i = 0; i < s.epilogue.tables; ++i) t.copy[i] = got[2 + i].data();
  }
  const edgeqat::Layer layer(c.spec, isa);
  layer.run(t, {});
  return !differs(c, isa, got, reals);
}

// The small loops of an instruction set against the portable ones.
bool check_helpers(const edgeqat::Isa& isa) {
  const edgeqat::Isa& plain = *edgeqat::portable_isa();
  bool same = true;
  for (int turn = 0; turn < 50; ++turn) {
    const size_t count = size_t(uniform(1, 300));
    std::vector<uint8_t> a(count), b(count), table(256), first(count), second(count);
    for (auto* v : {&a, &b, &table})
      for (auto& code : *v) code = uint8_t(uniform(0, 255));
    isa.translate(table.data(), a.data(), count, first.data());
    plain.translate(table.data(), a.data(), count, second.data());
    same &= first == second;
    const uint8_t* both[2] = {a.data(), b.data()};
    isa.largest(both, size_t(turn % 3), count, first.data());
    plain.largest(both, size_t(turn % 3), count, second.data());
    same &= first == second;
    std::vector<float> x(count);
    for (auto& v : x) v = pick({real(-5, 300), 0.5f, 1.5f, 2.5f, -0.5f, 1e30f, -1e30f, NAN});
    isa.quantize(x.data(), count, 1.0f, turn % 200, 2, 250, first.data());
    plain.quantize(x.data(), count, 1.0f, turn % 200, 2, 250, second.data());
    same &= first == second;
    std::vector<uint8_t> bits(8), other(8);
    a.resize(64);
    isa.pack_bits(a.data(), 64, bits.data());
    plain.pack_bits(a.data(), 64, other.data());
    same &= bits == other;
  }
  if (!same) std::printf("%s: a helper differs from the portable one\n", isa.name);
  return same;
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 300;
  const edgeqat::Isa* isa = count > 2 ? edgeqat::isa_named(arguments[2]) : &edgeqat::chosen_isa();
  if (!isa) {
    std::printf("%s: unknown, or this processor cannot run it\n", arguments[2]);
    return 2;
  }
  generator.seed(count > 3 ? unsigned(std::atoi(arguments[3])) : 0u);
  int wrong = !check_helpers(*isa);
  for (int i = 0; i < cases && wrong < 10; ++i) wrong += !run_case(*isa);
  std::printf("%s: %d layers, %d with wrong codes\n", isa->name, cases, wrong);
  return wrong ? 1 : 0;
}
