// The optimizer's arithmetic as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// Adds threads, the update and the norm to `module`.
void bind_arithmetic(pybind11::module_& module);

}  // namespace offload
