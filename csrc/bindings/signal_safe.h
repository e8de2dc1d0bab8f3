// What Python code cannot do where a signal's handler may raise after any call.
// TryLock takes a threading.RLock in a `with` statement only where that is possible at once. Python
// code cannot: a signal's handler may raise right after acquire() and leave the lock taken for
// ever, but not between a native __enter__ and the body.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// Adds both types to `module`; false with a Python error set.
bool add_signal_safe_types(PyObject* module);

}  // namespace offload
