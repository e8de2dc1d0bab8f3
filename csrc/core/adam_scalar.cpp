// The definition, for any processor.
#include "adam_loop.h"

namespace offload {
const AdamVersion kAdamScalar = {&update, &block_norm, &block_sum};
}  // namespace offload
