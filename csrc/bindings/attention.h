// Attention over blocks of tokens as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// Adds the attention over blocks, its backward and the scores of pairs of blocks to `module`.
void bind_attention(pybind11::module_& module);

}  // namespace offload
