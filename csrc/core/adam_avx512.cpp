// The same for processors with AVX-512.
#if defined(__x86_64__)
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#include "adam_loop.h"

namespace offload {
const AdamVersion kAdamAvx512 = {&update, &block_norm, &block_sum};
}  // namespace offload
#endif
