#include "adam.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace offload {
namespace {

// What one thread takes at a time: large beside the cost of taking it, small beside a parameter.
constexpr std::size_t kTaken = std::size_t{1} << 16;
static_assert(kTaken % kNormBlock == 0);

// Plain rounding and no flushing of denormals while it lives: torch.set_flush_denormal(), say, sets
// it otherwise for the threads that call us.
class PlainArithmetic {
 public:
#if defined(__x86_64__)
  PlainArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(kPlain); }
  ~PlainArithmetic() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kPlain = 0x1F80;  // all exceptions masked, to the nearest
  unsigned before_;
#elif defined(__aarch64__)
  PlainArithmetic() : before_(__builtin_aarch64_get_fpcr()) { __builtin_aarch64_set_fpcr(0); }
  ~PlainArithmetic() { __builtin_aarch64_set_fpcr(before_); }

 private:
  unsigned before_;
#endif
};

struct Named {
  const char* path;
  const AdamVersion* version;
  bool here;
};

// The best one first.
const std::vector<Named>& versions() {
  static const std::vector<Named> all = {
#if defined(__x86_64__)
      {"avx512", &kAdamAvx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma")},
      {"avx2", &kAdamAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"scalar", &kAdamScalar, true},
  };
  return all;
}

const Named& chosen() {
  static const Named& best = *std::find_if(versions().begin(), versions().end(),
                                           [](const Named& named) { return named.here; });
  return best;
}

const void* at(const void* array, DType dtype, std::size_t element) {
  return static_cast<const std::byte*>(array) + element * dtype_bytes(dtype);
}

// A thread's share of an array, from which the others take when theirs is done.
struct Share {
  std::atomic<std::size_t> next{0};
  std::size_t end = 0;
};

// Calls work(first, end) for all of `count` elements, each thread going through memory in one run:
// that is read faster than parts that threads take in turns.
void for_each_run(ThreadPool& pool, std::size_t count,
                  const std::function<void(std::size_t, std::size_t)>& work) {
  const std::size_t num_parts = (count + kTaken - 1) / kTaken;
  // One alone would be run by the caller, who may not be where the pool's threads are to be.
  const std::size_t num_shares = std::min<std::size_t>(num_parts, std::max(2u, pool.num_threads()));
  std::vector<Share> shares(num_shares);
  for (std::size_t at = 0; at < num_shares; ++at) {
    shares[at].next = at * num_parts / num_shares * kTaken;
    shares[at].end = std::min(count, (at + 1) * num_parts / num_shares * kTaken);
  }
  pool.run(num_shares, [&](std::size_t mine) {
    for (std::size_t at = 0; at < num_shares; ++at) {
      Share& share = shares[(mine + at) % num_shares];
      for (;;) {
        const std::size_t first = share.next.fetch_add(kTaken, std::memory_order_relaxed);
        if (first >= share.end) break;
        work(first, std::min(first + kTaken, share.end));
      }
    }
  });
}

double total(ThreadPool& pool, const void* values, DType dtype, std::size_t count,
             double (*of_block)(const void*, DType, std::size_t)) {
  std::vector<double> sums((count + kNormBlock - 1) / kNormBlock);
  for_each_run(pool, count, [&](std::size_t first, std::size_t end) {
    const PlainArithmetic plain;
    for (; first < end; first += kNormBlock) {
      sums[first / kNormBlock] =
          of_block(at(values, dtype, first), dtype, std::min(kNormBlock, end - first));
    }
  });
  return sum_of_blocks(sums);
}

// Not inlined, so that none of it is computed before the mode of its caller is set.
[[gnu::noinline]] AdamConstants constants_of(const AdamSettings& settings, std::uint64_t step,
                                             double grad_scale, double clip) {
  const double correction1 = 1 - std::pow(settings.beta1, static_cast<double>(step));
  const double correction2 = 1 - std::pow(settings.beta2, static_cast<double>(step));
  const double factor = clip / grad_scale;
  // torch.lerp() goes from whichever end is closer.
  const float weight = static_cast<float>(1 - settings.beta1);
  AdamConstants constants;
  constants.grad_factor = static_cast<float>(settings.maximize ? -factor : factor);
  constants.decay = static_cast<float>(1 - settings.lr * settings.weight_decay);
  constants.lerp_from_grad = !(weight < 0.5f);
  constants.lerp_weight = constants.lerp_from_grad ? weight - 1 : weight;
  constants.beta2 = static_cast<float>(settings.beta2);
  constants.one_minus_beta2 = static_cast<float>(1 - settings.beta2);
  constants.step_size = static_cast<float>(settings.lr / correction1);
  constants.root_correction = static_cast<float>(std::sqrt(correction2));
  constants.eps = static_cast<float>(settings.eps);
  return constants;
}

}  // namespace

AdamConstants make_adam_constants(const AdamSettings& settings, std::uint64_t step,
                                  double grad_scale, double clip) {
  const PlainArithmetic plain;
  return constants_of(settings, step, grad_scale, clip);
}

void adam_update(ThreadPool& pool, const AdamConstants& constants, const AdamArrays& arrays,
                 const AdamVersion& version) {
  for_each_run(pool, arrays.count, [&](std::size_t first, std::size_t end) {
    const PlainArithmetic plain;
    AdamArrays part = arrays;
    part.grad = at(arrays.grad, arrays.grad_dtype, first);
    part.master_param += first;
    part.exp_avg += first;
    part.exp_avg_sq += first;
    if (arrays.param != nullptr) {
      part.param = const_cast<void*>(at(arrays.param, arrays.param_dtype, first));
    }
    part.count = end - first;
    version.update(constants, part);
  });
}

double squared_norm(ThreadPool& pool, const void* values, DType dtype, std::size_t count,
                    const AdamVersion& version) {
  return total(pool, values, dtype, count, version.block_norm);
}

double plain_sum(ThreadPool& pool, const void* values, DType dtype, std::size_t count,
                 const AdamVersion& version) {
  return total(pool, values, dtype, count, version.block_sum);
}

// Neighbours first, then theirs: a tree whose shape only the count decides.
double sum_of_blocks(std::vector<double>& sums) {
  for (std::size_t step = 1; step < sums.size(); step *= 2) {
    for (std::size_t block = 0; block + step < sums.size(); block += 2 * step) {
      sums[block] += sums[block + step];
    }
  }
  return sums.empty() ? 0.0 : sums[0];
}

const char* adam_path() { return chosen().path; }

const AdamVersion& best_adam_version() { return *chosen().version; }

const AdamVersion* adam_version(const char* path) {
  for (const Named& named : versions()) {
    if (std::strcmp(named.path, path) == 0) return named.here ? named.version : nullptr;
  }
  return nullptr;
}

}  // namespace offload
