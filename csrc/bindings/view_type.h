// SavedView is what autograd holds in a saved tensor's place, and DropBox is where its end is
// noted. Both are types of the C API. A view tells of its own end without running Python code: a
// Python finalizer would be the first frame that is entered after a long stretch of C++, so a
// pending Ctrl-C would be raised in it, and what is raised in a finalizer is lost. And one is made
// for every saved tensor: with its sizes and strides inside, it gives the garbage collector nothing
// to visit.
#pragma once

#include <pybind11/pybind11.h>

namespace offload {

// Adds both types to `module`; false with a Python error set.
bool add_view_types(PyObject* module);

}  // namespace offload
