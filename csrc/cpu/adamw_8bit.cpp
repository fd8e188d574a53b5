// A step of AdamW with 8-bit moments, one block of numbers with a scale after the other: what
// rlhf/engine/adamw_8bit.py defines, to the bit. So products and sums are not fused here (setup.py),
// and each is in the order of that definition.

#include <string.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t kBlock = kAdamw8bitBlock;
constexpr int kCut = 7;  // bits of a float16's mantissa that a code lacks
constexpr float kSignedLimit = 1.875f, kUnsignedLimit = 61440.0f;
constexpr float kTiny = 0x1p-126f;  // the smallest normal number

// The bits of a word of noise that round the mean, the square and the weight.
RK_FORMULA Ints mean_noise(Ints word) { return word & 0x7f; }
RK_FORMULA Ints square_noise(Ints word) { return (word >> 7) & 0x7f; }
RK_FORMULA Ints weight_noise(Ints word) { return word >> 14; }

RK_FORMULA Floats decode_signed(Bytes codes, float scale) {
  const Halves code = widen_to_halves(codes);
  return Float16::widen(((code & 0x80) << 8) | ((code & 0x7f) << kCut)) * scale;
}

RK_FORMULA Floats decode_unsigned(Bytes codes, float scale) {
  return Float16::widen(widen_to_halves(codes) << kCut) * scale;
}

RK_FORMULA Bytes encode_signed(Floats scaled, Ints noise) {
  const Ints bits = Ints(widen_integers(Float16::narrow(scaled))) + noise;
  return narrow_to_bytes(((bits >> 8) & 0x80) | ((bits >> kCut) & 0x7f));
}

// A NaN's sign is one here too: such a code becomes 1.
RK_FORMULA Bytes encode_unsigned(Floats scaled, Ints noise) {
  const Ints half = (Ints(widen_integers(Float16::narrow(scaled))) << 16) >> 16;
  const Ints code = (half + noise) >> kCut;
  return narrow_to_bytes(code > 1 ? code : Ints{} + 1);
}

// The largest magnitude. As integers those of floats have the same order, and NaN is the largest.
class Largest {
 public:
  RK_FORMULA void add(Floats x) {
    const Ints magnitude = bits_as<Ints>(x) & 0x7fffffff;
    bits_ = magnitude > bits_ ? magnitude : bits_;
  }
  RK_FORMULA float value() const {
    int32_t result = bits_[0];
    for (int i = 1; i < kLanes; ++i) result = bits_[i] > result ? bits_[i] : result;
    return bits_as<float>(result);
  }

 private:
  Ints bits_ = {};
};

// Writes a block's scale; what to multiply its values with to be coded.
RK_FORMULA float factor_of(float largest, float limit, float* scale) {
  const float exact = largest / limit;
  const float normal = exact < kTiny ? kTiny : exact;  // NaN stays
  *scale = largest == 0.0f ? 0.0f : normal;
  return 1.0f / normal;
}

template <class Type>
struct Block {
  typedef typename Type::Element Element;
  Element* weights;
  int8_t* remainder;
  const Element* gradient;
  uint8_t *mean, *square;
  float *mean_scale, *square_scale;
  const int32_t* noise;

  Block(const Adamw8bit& args, int64_t start)
      : weights(static_cast<Element*>(args.weights) + start),
        remainder(args.remainder ? args.remainder + start : nullptr),
        gradient(static_cast<const Element*>(args.gradient) + start),
        mean(args.mean + start),
        square(args.square + start),
        mean_scale(args.mean_scale + start / kBlock),
        square_scale(args.square_scale + start / kBlock),
        noise(args.noise + start) {}
};

RK_FORMULA Floats read_weights(const Block<Float32>& block, int64_t i) {
  return load<Float32>(block.weights + i);
}

RK_FORMULA void write_weights(const Block<Float32>& block, int64_t i, Floats x) {
  store<Float32>(block.weights + i, x);
}

// Weights of 24 bits: bfloat16, whose last digit is 256 of the remainder's.
RK_FORMULA Floats read_weights(const Block<BFloat16>& block, int64_t i) {
  const Ints upper = Ints(widen_integers(load_as<Halves>(block.weights + i))) << 16;
  const Ints lower = (widen_bytes(load_as<Bytes>(block.remainder + i)) << 24) >> 16;
  return bits_as<Floats>(upper + lower);
}

RK_FORMULA void write_weights(const Block<BFloat16>& block, int64_t i, Floats x) {
  const Ints bits = (bits_as<Ints>(x) + weight_noise(load_as<Ints>(block.noise + i))) >> 8;
  const Ints upper = (bits + 128) >> 8;
  const Halves weights = narrow_integers(UInts(upper));
  const Bytes remainder = narrow_to_bytes(bits - (upper << 8));
  memcpy(block.weights + i, &weights, sizeof(weights));
  memcpy(block.remainder + i, &remainder, sizeof(remainder));
}

template <class Type>
RK_FORMULA void update(const Block<Type>& block, const Adamw8bitSettings& with) {
  float means[kBlock], squares[kBlock];
  Largest largest_mean, largest_square;
  const float mean_scale = *block.mean_scale, square_scale = *block.square_scale;
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Floats gradient = load<Type>(block.gradient + i);
    const Floats mean = decode_signed(load_as<Bytes>(block.mean + i), mean_scale) * with.beta1 +
                        gradient * with.rest1;
    const Floats square =
        decode_unsigned(load_as<Bytes>(block.square + i), square_scale) * with.beta2 +
        gradient * with.rest2 * gradient;
    store<Float32>(means + i, mean);
    store<Float32>(squares + i, square);
    largest_mean.add(mean);
    largest_square.add(square);
    // The weight sees the moments as they are before they are rounded.
    const Floats change = mean / (root(square) * with.square_factor + with.eps);
    write_weights(block, i, read_weights(block, i) * with.decay + change * with.rate);
  }
  const float of_mean = factor_of(largest_mean.value(), kSignedLimit, block.mean_scale);
  const float of_square = factor_of(largest_square.value(), kUnsignedLimit, block.square_scale);
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Ints noise = load_as<Ints>(block.noise + i);
    const Floats mean = load<Float32>(means + i) * of_mean;
    const Floats square = load<Float32>(squares + i) * of_square;
    const Bytes mean_code = encode_signed(mean, mean_noise(noise));
    const Bytes square_code = encode_unsigned(square, square_noise(noise));
    memcpy(block.mean + i, &mean_code, sizeof(mean_code));
    memcpy(block.square + i, &square_code, sizeof(square_code));
  }
}

// A shorter block, in a copy filled up with zeros.
template <class Type>
void update_first(const Block<Type>& block, int64_t count, const Adamw8bitSettings& with) {
  typename Type::Element weights[kBlock] = {}, gradient[kBlock] = {};
  int8_t remainder[kBlock] = {};
  uint8_t mean[kBlock] = {}, square[kBlock] = {};
  int32_t noise[kBlock] = {};
  const size_t bytes = size_t(count);
  memcpy(weights, block.weights, bytes * sizeof(*weights));
  memcpy(gradient, block.gradient, bytes * sizeof(*gradient));
  if (block.remainder) memcpy(remainder, block.remainder, bytes);
  memcpy(mean, block.mean, bytes);
  memcpy(square, block.square, bytes);
  memcpy(noise, block.noise, bytes * sizeof(*noise));
  Block<Type> copy = block;
  copy.weights = weights;
  copy.gradient = gradient;
  copy.remainder = remainder;
  copy.mean = mean;
  copy.square = square;
  copy.noise = noise;
  update(copy, with);
  memcpy(block.weights, weights, bytes * sizeof(*weights));
  if (block.remainder) memcpy(block.remainder, remainder, bytes);
  memcpy(block.mean, mean, bytes);
  memcpy(block.square, square, bytes);
}

template <class Type>
void update_all(const Adamw8bit& args) {
  const int64_t whole = args.size / kBlock * kBlock;
  for (int64_t start = 0; start < whole; start += kBlock) {
    update(Block<Type>(args, start), args.settings);
  }
  if (whole < args.size) {
    update_first(Block<Type>(args, whole), args.size - whole, args.settings);
  }
}

}  // namespace

void adamw_8bit(const Adamw8bit& args) {
  args.remainder ? update_all<BFloat16>(args) : update_all<Float32>(args);
}

}  // namespace RK_ISA
}  // namespace rk
