// Extent and Buffer as Python sees them. Every saved tensor makes one of each, so they are types of
// the C API: registering an instance with pybind11 costs more than the calls themselves.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "../core/error.h"
#include "../core/spill.h"

namespace offload {

// Sets the OSError that says what an IoError says.
void set_os_error(const IoError& error);

// Adds both types to `module`; false with a Python error set.
bool add_extent_types(PyObject* module);

// A new reference to an Extent, or to None for nullptr; nullptr with a Python error set.
PyObject* make_extent(std::shared_ptr<Extent> extent);

// The same for a Buffer; None where it has no slice.
PyObject* make_buffer(Restored restored);

// What a Buffer is of; throws std::invalid_argument for any other object.
const Restored& restored_in(PyObject* buffer);

}  // namespace offload
