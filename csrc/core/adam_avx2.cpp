// The same for processors with AVX2 and FMA.
#if defined(__x86_64__)
#include <cstring>

#pragma GCC target("avx2,fma")
#include "adam_loop.h"

namespace offload {
const AdamVersion kAdamAvx2 = {&update, &block_norm, &block_sum};
}  // namespace offload
#endif
