// From a JPEG file to a net's input: decoded by libjpeg, resized as Pillow's BILINEAR does, normalised.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>

namespace image {

struct Picture {
  int width;
  int height;
  std::vector<uint8_t> pixels;  // rows of red, green, blue
};

struct JpegError {
  jpeg_error_mgr manager;
  jmp_buf back;
};

// Whether `file` could be decoded into `picture`. libjpeg's errors jump back here, so nothing in this function has a
// destructor.
inline bool decode_jpeg(FILE* file, Picture& picture) {
  jpeg_decompress_struct decoder;
  JpegError error;
  decoder.err = jpeg_std_error(&error.manager);
  error.manager.error_exit = [](j_common_ptr common) {
    std::longjmp(reinterpret_cast<JpegError*>(common->err)->back, 1);
  };
  if (setjmp(error.back) != 0) {
    jpeg_destroy_decompress(&decoder);
    return false;
  }
  jpeg_create_decompress(&decoder);
  jpeg_stdio_src(&decoder, file);
  jpeg_read_header(&decoder, TRUE);
  decoder.out_color_space = JCS_RGB;
  jpeg_start_decompress(&decoder);
  picture.width = int(decoder.output_width);
  picture.height = int(decoder.output_height);
  picture.pixels.resize(size_t(picture.width) * picture.height * 3);
  while (decoder.output_scanline < decoder.output_height) {
    JSAMPROW row = picture.pixels.data() + size_t(decoder.output_scanline) * picture.width * 3;
    jpeg_read_scanlines(&decoder, &row, 1);
  }
  jpeg_finish_decompress(&decoder);
  jpeg_destroy_decompress(&decoder);
  return true;
}

inline Picture read_jpeg(const char* path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), &std::fclose);
  if (!file) throw std::runtime_error(std::string(path) + ": cannot be opened");
  Picture picture{0, 0, {}};
  if (!decode_jpeg(file.get(), picture)) {
    throw std::runtime_error(std::string(path) + ": is not a JPEG file that can be read");
  }
  return picture;
}

// What one output pixel is made of: inputs from `first` on, with weights in units of 2^-22.
struct Taps {
  int first;
  std::vector<int32_t> weights;
};

constexpr int kPrecision = 22;

// A triangle filter, as wide as two output pixels where the picture shrinks: Pillow's BILINEAR.
inline std::vector<Taps> taps_of(int from, int to) {
  const double scale = double(from) / to;
  const double support = std::max(scale, 1.0);
  std::vector<Taps> all(static_cast<size_t>(to));
  for (int out = 0; out < to; ++out) {
    const double centre = (out + 0.5) * scale;
    const int first = std::max(int(centre - support + 0.5), 0);
    const int end = std::min(int(centre + support + 0.5), from);
    std::vector<double> weights;
    double sum = 0;
    for (int in = first; in < end; ++in) {
      const double distance = std::abs((in - centre + 0.5) / support);
      weights.push_back(std::max(1.0 - distance, 0.0));
      sum += weights.back();
    }
    Taps& taps = all[size_t(out)];
    taps.first = first;
    for (const double weight : weights) taps.weights.push_back(int32_t(0.5 + weight / sum * (1 << kPrecision)));
  }
  return all;
}

// Resizes along one axis: the other has `lines` lines. Neighbours along the axis are `step` bytes apart, lines
// `line_step`.
inline std::vector<uint8_t> resize_axis(const std::vector<uint8_t>& in, int from, int to, int lines, bool along_rows) {
  const size_t in_step = along_rows ? 3 : size_t(lines) * 3;
  const size_t in_line = along_rows ? size_t(from) * 3 : 3;
  const size_t out_line = along_rows ? size_t(to) * 3 : 3;
  const std::vector<Taps> all = taps_of(from, to);
  std::vector<uint8_t> out(size_t(lines) * to * 3);
  for (int line = 0; line < lines; ++line) {
    for (int place = 0; place < to; ++place) {
      const Taps& taps = all[size_t(place)];
      for (size_t channel = 0; channel < 3; ++channel) {
        int64_t sum = int64_t(1) << (kPrecision - 1);
        for (size_t tap = 0; tap < taps.weights.size(); ++tap) {
          const size_t at = line * in_line + (size_t(taps.first) + tap) * in_step + channel;
          sum += int64_t(in[at]) * taps.weights[tap];
        }
        const int64_t rounded = sum >> kPrecision;
        out[line * out_line + size_t(place) * in_step + channel] = uint8_t(std::clamp<int64_t>(rounded, 0, 255));
      }
    }
  }
  return out;
}

inline Picture resized(const Picture& picture, int side) {
  Picture result = picture;
  if (result.width != side) {
    result.pixels = resize_axis(result.pixels, result.width, side, result.height, true);
    result.width = side;
  }
  if (result.height != side) {
    result.pixels = resize_axis(result.pixels, result.height, side, result.width, false);
    result.height = side;
  }
  return result;
}

// N_C_H_W float32 of one image: (value / 255 - mean) / std per channel.
inline std::vector<float> normalised(const Picture& picture, const float mean[3], const float deviation[3]) {
  const size_t count = size_t(picture.width) * picture.height;
  std::vector<float> values(3 * count);
  for (size_t channel = 0; channel < 3; ++channel) {
    for (size_t pixel = 0; pixel < count; ++pixel) {
      const float value = float(picture.pixels[3 * pixel + channel]) / 255.0f;
      values[channel * count + pixel] = (value - mean[channel]) / deviation[channel];
    }
  }
  return values;
}

}  // namespace image
