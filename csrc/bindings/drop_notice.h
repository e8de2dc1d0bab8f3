// DropNotice tells of its own end without running Python code. A Python finalizer would be the
// first frame that is entered after a long stretch of C++, so a pending Ctrl-C would be raised in
// it, and what is raised in a finalizer is lost.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// Adds the type to `module`; false with a Python error set.
bool add_drop_notice(PyObject* module);

}  // namespace offload
