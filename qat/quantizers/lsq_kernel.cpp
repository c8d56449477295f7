// LSQ in one pass over memory (equations: qat/quantizers/lsq.py). Built and called by qat/quantizers/fused.py.
//
// A tensor is seen as outer x channels x inner elements in the order they lie in memory: a scale for each channel, or
// channels = 1. Rounding is the same as PyTorch's, operation by operation: real division, clamp, round half to even,
// multiplication, all float32 (built with -ffp-contract=off). bfloat16 is widened on the way in and rounded on the way
// out.
//
// Sums for the scale: 16 float32 lanes over at most SPAN elements, then float64, in an order that depends on the shape
// alone and not on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t SPAN = 512;       // elements that float32 lanes sum before float64 takes over
constexpr int64_t PIECE = 1 << 14;  // elements of one task; larger tensors are shared among threads
constexpr float SMALLEST_SCALE = 1e-10f;

struct bf16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void store(float* where, float value) { *where = value; }

inline void store(bf16* where, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  where->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline float positive(float raw) {
  const float size = std::fabs(raw);
  return size < SMALLEST_SCALE ? SMALLEST_SCALE : size;  // NaN stays NaN
}

// x above `ceiling` counts as `ceiling`, with derivative 0: the upper clip of a ReLU6 that the quantizer stands in for.
struct Grid {
  float low, high, ceiling;
};

inline float capped(float x, Grid grid) { return x > grid.ceiling ? grid.ceiling : x; }

inline float code(float v, Grid grid) {
  v = v < grid.low ? grid.low : v;
  v = v > grid.high ? grid.high : v;
  return std::rint(v);
}

template <class T>
void quantize_run(const T* x, T* out, int64_t count, float scale, Grid grid) {
  for (int64_t i = 0; i < count; ++i) store(out + i, code(capped(load(x[i]), grid) / scale, grid) * scale);
}

struct Derivative {
  float x, scale;
};

// By x: 1 where nothing clips. By the scale: round(v) - v inside the grid, else the clipped code alone.
inline Derivative derivative(float x, float scale, Grid grid) {
  const float v = capped(x, grid) / scale;
  const bool inside = (v > grid.low) & (v < grid.high);
  return {inside & (x < grid.ceiling) ? 1.0f : 0.0f, code(v, grid) - (inside ? v : 0.0f)};
}

template <class T>
void lanes_of(const T* x, const T* upstream, T* gradient, float scale, Grid grid, float* lanes) {
  for (int j = 0; j < LANES; ++j) {
    const float up = load(upstream[j]);
    const Derivative by = derivative(load(x[j]), scale, grid);
    store(gradient + j, up * by.x);
    lanes[j] += by.scale * up;
  }
}

template <class T>
double differentiate_run(const T* x, const T* upstream, T* gradient, int64_t count, float scale, Grid grid) {
  double total = 0;
  for (int64_t at = 0; at < count; at += SPAN) {
    const int64_t end = std::min(at + SPAN, count);
    float lanes[LANES] = {};
    int64_t i = at;
    for (; i + LANES <= end; i += LANES) lanes_of(x + i, upstream + i, gradient + i, scale, grid, lanes);
    if (i < end) {  // the last few through buffers: zeros beyond the end add nothing
      T some_x[LANES] = {}, some_up[LANES] = {}, some_gradient[LANES];
      std::copy(x + i, x + end, some_x);
      std::copy(upstream + i, upstream + end, some_up);
      lanes_of(some_x, some_up, some_gradient, scale, grid, lanes);
      std::copy(some_gradient, some_gradient + (end - i), gradient + i);
    }
    for (float lane : lanes) total += lane;
  }
  return total;
}

// Channels are innermost in memory: a row holds one element of each.
template <class T>
void quantize_row(const T* x, T* out, int64_t channels, const float* scales, Grid grid) {
  for (int64_t c = 0; c < channels; ++c) store(out + c, code(capped(load(x[c]), grid) / scales[c], grid) * scales[c]);
}

template <class T>
void differentiate_row(const T* x, const T* upstream, T* gradient, int64_t channels, const float* scales, Grid grid,
                       float* sums) {
  for (int64_t c = 0; c < channels; ++c) {
    const float up = load(upstream[c]);
    const Derivative by = derivative(load(x[c]), scales[c], grid);
    store(gradient + c, up * by.x);
    sums[c] += by.scale * up;
  }
}

// How a tensor is cut into tasks of about PIECE elements: runs of one channel (inner > 1 or one channel), or bands of
// rows.
struct Cut {
  int64_t outer, channels, inner;
  bool rows() const { return channels > 1 && inner == 1; }
  int64_t length() const { return rows() ? outer : inner; }  // what is cut, of each unit
  int64_t units() const { return rows() ? 1 : outer * channels; }
  int64_t width() const { return rows() ? channels : 1; }
  int64_t piece() const { return std::max<int64_t>(PIECE / width(), 1); }
  int64_t pieces() const { return (length() + piece() - 1) / piece(); }
  int64_t tasks() const { return units() * pieces(); }
  int64_t first(int64_t task) const { return task % pieces() * piece(); }
  int64_t last(int64_t task) const { return std::min(first(task) + piece(), length()); }
  int64_t offset(int64_t task) const { return task / pieces() * inner + first(task) * width(); }
  int64_t channel(int64_t task) const { return rows() ? 0 : task / pieces() % channels; }
  int threads(int wanted) const {
    return static_cast<int>(std::clamp<int64_t>(outer * channels * inner / PIECE, 1, wanted));
  }
};

std::vector<float> positive_scales(const float* raw, int64_t channels) {
  std::vector<float> scales(channels);
  for (int64_t c = 0; c < channels; ++c) scales[c] = positive(raw[c]);
  return scales;
}

template <class T>
void quantize(const T* x, const float* raw_scales, T* out, Cut cut, Grid grid, int threads) {
  const std::vector<float> scales = positive_scales(raw_scales, cut.channels);
#pragma omp parallel for num_threads(cut.threads(threads)) if (cut.threads(threads) > 1) schedule(static)
  for (int64_t task = 0; task < cut.tasks(); ++task) {
    const int64_t count = cut.last(task) - cut.first(task), at = cut.offset(task);
    if (!cut.rows()) {
      quantize_run(x + at, out + at, count, scales[cut.channel(task)], grid);
      continue;
    }
    for (int64_t row = 0; row < count; ++row)
      quantize_row(x + at + row * cut.channels, out + at + row * cut.channels, cut.channels, scales.data(), grid);
  }
}

// Rows SPAN at a time into float32, each such span into `totals` (float64, a channel each).
template <class T>
void differentiate_rows(const T* x, const T* upstream, T* gradient, int64_t rows, int64_t channels, const float* scales,
                        Grid grid, double* totals) {
  std::vector<float> sums(channels);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * channels;
    differentiate_row(x + at, upstream + at, gradient + at, channels, scales, grid, sums.data());
    if ((row + 1) % (SPAN / LANES) && row + 1 < rows) continue;
    for (int64_t c = 0; c < channels; ++c) totals[c] += sums[c];
    std::fill(sums.begin(), sums.end(), 0.0f);
  }
}

template <class T>
void differentiate(const T* x, const T* upstream, const float* raw_scales, T* gradient, float* scale_gradient, Cut cut,
                   Grid grid, double gradient_scale, int threads) {
  const std::vector<float> scales = positive_scales(raw_scales, cut.channels);
  std::vector<double> partial(cut.tasks() * cut.width());
#pragma omp parallel for num_threads(cut.threads(threads)) if (cut.threads(threads) > 1) schedule(static)
  for (int64_t task = 0; task < cut.tasks(); ++task) {
    const int64_t count = cut.last(task) - cut.first(task), at = cut.offset(task);
    double* totals = partial.data() + task * cut.width();
    if (cut.rows())
      differentiate_rows(x + at, upstream + at, gradient + at, count, cut.channels, scales.data(), grid, totals);
    else
      *totals = differentiate_run(x + at, upstream + at, gradient + at, count, scales[cut.channel(task)], grid);
  }
  std::vector<double> totals(cut.channels);
  for (int64_t task = 0; task < cut.tasks(); ++task)
    for (int64_t w = 0; w < cut.width(); ++w) totals[cut.channel(task) + w] += partial[task * cut.width() + w];
  for (int64_t c = 0; c < cut.channels; ++c)
    scale_gradient[c] =
        static_cast<float>(raw_scales[c] < 0 ? -totals[c] * gradient_scale : totals[c] * gradient_scale);
}

}  // namespace

extern "C" {

void lsq_forward(const void* x, const float* raw_scales, void* out, int64_t outer, int64_t channels, int64_t inner,
                 int low, int high, float ceiling, int is_bf16, int threads) {
  const Cut cut{outer, channels, inner};
  const Grid grid{static_cast<float>(low), static_cast<float>(high), ceiling};
  if (is_bf16)
    quantize(static_cast<const bf16*>(x), raw_scales, static_cast<bf16*>(out), cut, grid, threads);
  else
    quantize(static_cast<const float*>(x), raw_scales, static_cast<float*>(out), cut, grid, threads);
}

void lsq_backward(const void* x, const void* upstream, const float* raw_scales, void* gradient, float* scale_gradient,
                  int64_t outer, int64_t channels, int64_t inner, int low, int high, float ceiling,
                  double gradient_scale, int is_bf16, int threads) {
  const Cut cut{outer, channels, inner};
  const Grid grid{static_cast<float>(low), static_cast<float>(high), ceiling};
  if (is_bf16)
    differentiate(static_cast<const bf16*>(x), static_cast<const bf16*>(upstream), raw_scales,
                  static_cast<bf16*>(gradient), scale_gradient, cut, grid, gradient_scale, threads);
  else
    differentiate(static_cast<const float*>(x), static_cast<const float*>(upstream), raw_scales,
                  static_cast<float*>(gradient), scale_gradient, cut, grid, gradient_scale, threads);
}
}
