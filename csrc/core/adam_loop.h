// The loops over adam_arithmetic.h, for whoever includes this to compile for its own processor: the
// compiler makes vectors of them, which changes no bit, since no operation depends on another lane.
//
// No template of the standard library is used here: its code would be shared with translation units
// that are compiled for older processors.
#pragma once

#include <cstring>

#include "adam_arithmetic.h"
#include "adam_versions.h"

namespace offload {
namespace {

// So many elements are cast, updated and cast again while they are in the first-level cache.
constexpr std::size_t kRun = 512;

std::size_t shorter(std::size_t one, std::size_t other) { return one < other ? one : other; }

void load(const void* values, DType dtype, std::size_t first, std::size_t count, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, static_cast<const float*>(values) + first, count * sizeof(float));
    return;
  }
  const auto* from = static_cast<const std::uint16_t*>(values) + first;
  if (dtype == DType::kBFloat16) {
    for (std::size_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
  } else {
    for (std::size_t i = 0; i < count; ++i) to[i] = from_float16(from[i]);
  }
}

void store(const float* values, std::size_t count, void* array, DType dtype, std::size_t first) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(array) + first, values, count * sizeof(float));
    return;
  }
  auto* to = static_cast<std::uint16_t*>(array) + first;
  if (dtype == DType::kBFloat16) {
    for (std::size_t i = 0; i < count; ++i) to[i] = to_bfloat16(values[i]);
  } else {
    for (std::size_t i = 0; i < count; ++i) to[i] = to_float16(values[i]);
  }
}

void update_run(const AdamConstants& constants, const float* __restrict grad,
                float* __restrict master_param, float* __restrict exp_avg,
                float* __restrict exp_avg_sq, std::size_t count) {
  const AdamConstants step = constants;
  for (std::size_t i = 0; i < count; ++i) {
    float param = master_param[i], average = exp_avg[i], square = exp_avg_sq[i];
    adam_element(step, grad[i], param, average, square);
    master_param[i] = param;
    exp_avg[i] = average;
    exp_avg_sq[i] = square;
  }
}

void update(const AdamConstants& constants, const AdamArrays& arrays) {
  alignas(64) float grad[kRun];
  for (std::size_t first = 0; first < arrays.count; first += kRun) {
    const std::size_t count = shorter(kRun, arrays.count - first);
    float* master_param = arrays.master_param + first;
    load(arrays.grad, arrays.grad_dtype, first, count, grad);
    update_run(constants, grad, master_param, arrays.exp_avg + first, arrays.exp_avg_sq + first,
               count);
    if (arrays.param != nullptr) {
      store(master_param, count, arrays.param, arrays.param_dtype, first);
    }
  }
}

// Sixteen sums side by side, each of every sixteenth element in order, then added up in a tree.
template <bool kSquares>
double block_total(const void* values, DType dtype, std::size_t count) {
  constexpr std::size_t kLanes = 16;
  alignas(64) float run[kRun];
  alignas(64) double sums[kLanes] = {};
  for (std::size_t first = 0; first < count; first += kRun) {
    const std::size_t length = shorter(kRun, count - first);
    load(values, dtype, first, length, run);
    std::memset(run + length, 0, (kRun - length) * sizeof(float));
    for (std::size_t i = 0; i < length; i += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const double value = run[i + lane];
        sums[lane] += kSquares ? value * value : value;
      }
    }
  }
  for (std::size_t half = kLanes / 2; half != 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

double block_norm(const void* values, DType dtype, std::size_t count) {
  return block_total<true>(values, dtype, count);
}

double block_sum(const void* values, DType dtype, std::size_t count) {
  return block_total<false>(values, dtype, count);
}

}  // namespace
}  // namespace offload
