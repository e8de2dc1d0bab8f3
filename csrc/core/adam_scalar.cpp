// The definition, for any processor.
#include "adam_loop.h"

namespace offload {
const AdamVersion kAdamScalar = {&update, &block_norm};
}  // namespace offload
