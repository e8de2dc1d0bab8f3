// AdamW's update and norm: the same bits from every version, for every size, type and odd value.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "adam.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "adam_arithmetic.h"
#include "check.h"

using namespace offload;

namespace {

const std::vector<DType> kTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
const std::vector<std::string> kFast = {"avx2", "avx512"};

// Values of all kinds: ordinary, tiny, denormal, huge, infinite, not numbers, zeros.
float odd_value(std::mt19937& random) {
  switch (random() % 12) {
    case 0:
      return float_of(random());  // any bits at all
    case 1:
      return float_of(random() % 0x800000);  // denormal
    case 2:
      return -0.0f;
    case 3:
      return std::numeric_limits<float>::infinity();
    case 4:
      return 1e30f * std::normal_distribution<float>()(random);
    case 5:
      return 1e-30f * std::normal_distribution<float>()(random);
    default:
      return std::normal_distribution<float>()(random);
  }
}

// A guard behind each array tells of a store beyond its end.
struct State {
  std::size_t count, offset;
  std::vector<float> master_param, exp_avg, exp_avg_sq;
  std::vector<std::uint32_t> grad, param;  // as many bytes as any type needs

  State(std::size_t count, std::size_t offset, DType grad_dtype, std::mt19937& random)
      : count(count),
        offset(offset),
        master_param(count + offset + 16, 7.0f),
        exp_avg(master_param),
        exp_avg_sq(master_param),
        grad(count + offset + 16, 0x42424242),
        param(grad) {
    for (std::size_t i = offset; i < offset + count; ++i) {
      master_param[i] = odd_value(random);
      exp_avg[i] = odd_value(random);
      exp_avg_sq[i] = std::fabs(odd_value(random));
      const float value = odd_value(random);
      auto* halves = reinterpret_cast<std::uint16_t*>(grad.data());
      if (grad_dtype == DType::kFloat32) grad[i] = bits_of(value);
      if (grad_dtype == DType::kBFloat16) halves[i] = to_bfloat16(value);
      if (grad_dtype == DType::kFloat16) halves[i] = to_float16(value);
    }
  }

  AdamArrays arrays(DType grad_dtype, DType param_dtype) {
    const auto at = [&](std::vector<std::uint32_t>& values, DType dtype) {
      return reinterpret_cast<std::byte*>(values.data()) + offset * dtype_bytes(dtype);
    };
    AdamArrays all;
    all.grad = at(grad, grad_dtype);
    all.grad_dtype = grad_dtype;
    all.master_param = master_param.data() + offset;
    all.exp_avg = exp_avg.data() + offset;
    all.exp_avg_sq = exp_avg_sq.data() + offset;
    all.param = at(param, param_dtype);
    all.param_dtype = param_dtype;
    all.count = count;
    return all;
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool same(const State& a, const State& b) {
  return same(a.master_param, b.master_param) && same(a.exp_avg, b.exp_avg) &&
         same(a.exp_avg_sq, b.exp_avg_sq) && a.grad == b.grad && a.param == b.param;
}

AdamSettings settings_number(unsigned number) {
  AdamSettings settings;
  settings.maximize = number % 2;
  settings.beta1 = number % 3 == 0 ? 0.3 : 0.9;  // to either side of where lerp() turns round
  settings.weight_decay = number % 5 == 0 ? 0.0 : 0.1;
  return settings;
}

void all_versions_give_the_same_bits() {
  const AdamVersion& scalar = *adam_version("scalar");
  std::mt19937 random(1);
  for (const std::string& name : kFast) {
    const AdamVersion* fast = adam_version(name.c_str());
    if (fast == nullptr) continue;
    unsigned number = 0;
    for (const DType grad : kTypes) {
      for (const DType param : kTypes) {
        std::vector<std::size_t> counts = {511, 512, 513, 1024, 1500};
        for (std::size_t count = 0; count <= 70; ++count) counts.push_back(count);
        for (const std::size_t count : counts) {
          State state(count, random() % 9, grad, random);
          State expected = state;
          ++number;
          const AdamConstants constants =
              make_adam_constants(settings_number(number), 1 + number % 7, 1 + number % 4, 0.5);
          scalar.update(constants, expected.arrays(grad, param));
          fast->update(constants, state.arrays(grad, param));
          CHECK(same(state, expected));
        }
      }
    }
  }
}

void threads_change_no_bit_and_nothing_beyond_the_end() {
  std::mt19937 random(2);
  const State before(300'001, 3, DType::kBFloat16, random);
  const AdamConstants constants = make_adam_constants({}, 3, 1, 1);
  State expected = before;
  adam_version("scalar")->update(constants, expected.arrays(DType::kBFloat16, DType::kBFloat16));
  for (const unsigned num_threads : {1u, 2u, 5u}) {
    State state = before;
    ThreadPool pool(num_threads);
    adam_update(pool, constants, state.arrays(DType::kBFloat16, DType::kBFloat16));
    CHECK(same(state, expected));
  }
  CHECK(!same(before, expected));
}

void without_a_parameter_the_master_is_all_there_is() {
  std::mt19937 random(3);
  State state(1000, 0, DType::kFloat32, random), with = state;
  const auto untouched = state.param;
  AdamArrays arrays = state.arrays(DType::kFloat32, DType::kFloat32);
  arrays.param = nullptr;
  ThreadPool pool(1);
  adam_update(pool, make_adam_constants({}, 1, 1, 1), arrays);
  adam_update(pool, make_adam_constants({}, 1, 1, 1),
              with.arrays(DType::kFloat32, DType::kFloat32));
  CHECK(same(state.master_param, with.master_param));
  CHECK(state.param == untouched);
}

// Step by step in double precision: what the update means, to a part in a million.
void the_update_is_adamw() {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  AdamSettings settings;
  settings.weight_decay = 0.1;
  for (int trial = 0; trial < 1000; ++trial) {
    double p = normal(random), m = normal(random), v = std::fabs(normal(random));
    const double g = normal(random);
    float master = float(p), average = float(m), square = float(v);
    adam_element(make_adam_constants(settings, 4, 2, 0.5), float(g), master, average, square);
    const double scaled = g / 2 * 0.5;
    p -= settings.lr * settings.weight_decay * p;
    m = settings.beta1 * m + (1 - settings.beta1) * scaled;
    v = settings.beta2 * v + (1 - settings.beta2) * scaled * scaled;
    const double m_hat = m / (1 - std::pow(settings.beta1, 4));
    const double v_hat = v / (1 - std::pow(settings.beta2, 4));
    p -= settings.lr * m_hat / (std::sqrt(v_hat) + settings.eps);
    CHECK(std::fabs(master - p) < 1e-6 * (1 + std::fabs(p)));
    CHECK(std::fabs(average - m) < 1e-6 * (1 + std::fabs(m)));
    CHECK(std::fabs(square - v) < 1e-6 * (1 + std::fabs(v)));
  }
}

void one_kind_of_nan_is_stored() {
  const float nan = float_of(0xFFC01234);
  float master = 1, average = 0, square = 0;
  adam_element(make_adam_constants({}, 1, 1, 1), nan, master, average, square);
  for (const float value : {master, average, square}) CHECK_EQ(bits_of(value), 0x7FC00000u);
}

// The value of a half's bits, by its definition.
double value_of_half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

void halves_are_cast_exactly() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = from_float16(half);
    if ((half & 0x7C00) == 0x7C00) {
      CHECK((half & 0x3FF) != 0 ? std::isnan(value) : std::isinf(value));
      CHECK((half & 0x3FF) != 0 || std::signbit(value) == bool(half & 0x8000));
      CHECK_EQ(to_float16(value), (half & 0x3FF) != 0 ? 0x7E00 : half);
      continue;
    }
    CHECK(value == value_of_half(half) && std::signbit(value) == bool(half & 0x8000));
    CHECK_EQ(to_float16(value), half);
    if ((half & 0x7FFF) >= 0x7BFF) continue;
    // Half-way to the next one goes to the even one; anything more or less to the nearer.
    const float middle = float((value + value_of_half(half + 1)) / 2);
    CHECK_EQ(to_float16(middle), half % 2 == 0 ? half : half + 1);
    CHECK_EQ(to_float16(std::nextafter(middle, value)), half);
    CHECK_EQ(to_float16(std::nextafter(middle, 2 * middle - value)), half + 1);
  }
  CHECK_EQ(to_float16(65519.996f), 0x7BFF);
  CHECK_EQ(to_float16(65520.0f), 0x7C00);
  CHECK_EQ(to_float16(-1e30f), 0xFC00);
}

void brain_floats_are_cast_exactly() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto brain = static_cast<std::uint16_t>(bits);
    const float value = from_bfloat16(brain);
    CHECK_EQ(bits_of(value), bits << 16);
    CHECK_EQ(to_bfloat16(value), std::isnan(value) ? 0x7FC0 : brain);
    if ((brain & 0x7FFF) >= 0x7F80) continue;
    CHECK_EQ(to_bfloat16(float_of((bits << 16) + 0x7FFF)), brain);
    CHECK_EQ(to_bfloat16(float_of((bits << 16) + 0x8000)), brain % 2 == 0 ? brain : brain + 1);
    CHECK_EQ(to_bfloat16(float_of((bits << 16) + 0x8001)), brain + 1);
  }
}

#if defined(__x86_64__)
void denormals_stay_whatever_the_caller_flushes() {
  const unsigned before = _mm_getcsr();
  ThreadPool pool(2);
  for (const std::size_t count : {5, 200'000}) {
    std::mt19937 random(5);
    State state(count, 0, DType::kFloat32, random);
    for (std::size_t i = 0; i < count; ++i) state.exp_avg_sq[i] = 3e-42f;
    State expected = state;
    const AdamConstants constants = make_adam_constants({}, 2, 1, 1);
    adam_version("scalar")->update(constants, expected.arrays(DType::kFloat32, DType::kBFloat16));
    _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
    const unsigned flushing = _mm_getcsr();
    adam_update(pool, constants, state.arrays(DType::kFloat32, DType::kBFloat16));
    CHECK_EQ(_mm_getcsr(), flushing);
    _mm_setcsr(before);
    CHECK(same(state, expected));
  }
}
#endif

void the_norm_has_one_order() {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (const std::size_t count : {0, 1, 15, 16, 17, 4095, 4096, 4097, 70'000, 300'001}) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    long double exact = 0;
    for (const float value : values) exact += (long double)value * value;
    ThreadPool one(1), three(3);
    const double sum = squared_norm(one, values.data(), DType::kFloat32, count);
    CHECK_EQ(sum, squared_norm(three, values.data(), DType::kFloat32, count));
    CHECK(std::fabs(double(sum - exact)) <= 1e-12 * double(exact));
    for (const std::string& name : kFast) {
      const AdamVersion* fast = adam_version(name.c_str());
      const std::size_t some = std::min(count, kNormBlock);
      if (fast == nullptr) continue;
      CHECK_EQ(fast->block_norm(values.data(), DType::kFloat32, some),
               adam_version("scalar")->block_norm(values.data(), DType::kFloat32, some));
      CHECK_EQ(fast->block_sum(values.data(), DType::kFloat32, some),
               adam_version("scalar")->block_sum(values.data(), DType::kFloat32, some));
    }
  }
}

void the_norm_of_what_is_not_finite_is_not_finite() {
  ThreadPool pool(2);
  const float largest = std::numeric_limits<float>::max();
  for (const std::size_t place : {0, 4096, 99'999}) {
    std::vector<float> values(100'000, largest);
    CHECK(std::isfinite(squared_norm(pool, values.data(), DType::kFloat32, values.size())));
    for (const float wrong : {HUGE_VALF, -HUGE_VALF, NAN}) {
      values[place] = wrong;
      CHECK(!std::isfinite(squared_norm(pool, values.data(), DType::kFloat32, values.size())));
    }
  }
  std::vector<std::uint16_t> halves(5000, 0x3C00);
  CHECK_EQ(squared_norm(pool, halves.data(), DType::kFloat16, halves.size()), 5000.0);
  halves[4999] = 0x7C00;
  CHECK(!std::isfinite(squared_norm(pool, halves.data(), DType::kFloat16, halves.size())));
}

}  // namespace

int main() {
  all_versions_give_the_same_bits();
  threads_change_no_bit_and_nothing_beyond_the_end();
  without_a_parameter_the_master_is_all_there_is();
  the_update_is_adamw();
  one_kind_of_nan_is_stored();
  halves_are_cast_exactly();
  brain_floats_are_cast_exactly();
#if defined(__x86_64__)
  denormals_stay_whatever_the_caller_flushes();
#endif
  the_norm_has_one_order();
  the_norm_of_what_is_not_finite_is_not_finite();
  CHECK(adam_version(adam_path()) != nullptr);
  CHECK(adam_version("neon") == nullptr);
  std::printf("path: %s\n", adam_path());
  return check::status();
}
