// What Python code cannot do where a signal's handler may raise after any call.
// TryLock takes a threading.RLock in a `with` statement only where that is possible at once. Python
// code cannot: a signal's handler may raise right after acquire() and leave the lock taken for
// ever, but not between a native __enter__ and the body.
// HookScope is the base of a context that has hooks of autograd in force for its body and never
// after it. A subclass has _begin(), which returns a native callable that puts them in force,
// _pop(), native as well, which takes them away, and _end(*exception).
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// Adds these types to `module`; false with a Python error set.
bool add_signal_safe_types(PyObject* module);

}  // namespace offload
