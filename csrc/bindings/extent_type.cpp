#include "extent_type.h"

#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace offload {
namespace {

template <typename Value>
struct Object {
  PyObject_HEAD Value value;
};

using ExtentObject = Object<std::shared_ptr<Extent>>;
using BufferObject = Object<Restored>;

PyTypeObject* extent_type = nullptr;
PyTypeObject* buffer_type = nullptr;

template <typename Value>
PyObject* make(PyTypeObject* type, Value value) {
  auto* made = PyObject_New(Object<Value>, type);
  if (made == nullptr) return nullptr;
  new (&made->value) Value(std::move(value));
  return reinterpret_cast<PyObject*>(made);
}

template <typename Value>
void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<Object<Value>*>(self)->value.~Value();
  PyObject_Free(self);
  Py_DECREF(type);
}

Extent& extent_of(PyObject* self) { return *reinterpret_cast<ExtentObject*>(self)->value; }
Restored& restored_of(PyObject* self) { return reinterpret_cast<BufferObject*>(self)->value; }

// Runs `body`; what it throws becomes a Python error, and the result nullptr.
template <typename Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const IoError& error) {
    set_os_error(error);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// ---- Extent ----------------------------------------------------------------------------------

PyObject* extent_prefetch(PyObject* self, PyObject*) {
  return guarded([&] { return PyBool_FromLong(extent_of(self).prefetch()); });
}

PyObject* extent_fetch(PyObject* self, PyObject*) {
  return guarded([&] {
    // Another thread may drop the object while this one waits without the GIL.
    const std::shared_ptr<Extent> extent = reinterpret_cast<ExtentObject*>(self)->value;
    if (extent->ready()) return make(buffer_type, extent->fetch());
    Restored restored;
    {
      pybind11::gil_scoped_release nogil;
      restored = extent->fetch();
    }
    return make(buffer_type, std::move(restored));
  });
}

PyObject* extent_wait_written(PyObject* self, PyObject*) {
  return guarded([&] {
    const std::shared_ptr<Extent> extent = reinterpret_cast<ExtentObject*>(self)->value;
    {
      pybind11::gil_scoped_release nogil;
      extent->wait_written();
    }
    Py_RETURN_NONE;
  });
}

PyObject* extent_staged(PyObject* self, PyObject*) {
  return guarded([&] { return make(buffer_type, extent_of(self).staged()); });
}

PyObject* extent_start_write(PyObject* self, PyObject*) {
  return guarded([&] {
    const std::shared_ptr<Extent> extent = reinterpret_cast<ExtentObject*>(self)->value;
    {
      pybind11::gil_scoped_release nogil;
      extent->start_write();
    }
    Py_RETURN_NONE;
  });
}

PyObject* extent_ready(PyObject* self, void*) {
  return guarded([&] { return PyBool_FromLong(extent_of(self).ready()); });
}

PyObject* extent_nbytes(PyObject* self, void*) {
  return PyLong_FromUnsignedLongLong(extent_of(self).nbytes());
}

PyObject* extent_offset(PyObject* self, void*) {
  return PyLong_FromUnsignedLongLong(extent_of(self).offset());
}

// ---- Buffer ----------------------------------------------------------------------------------

PyObject* buffer_address(PyObject* self, void*) {
  return PyLong_FromVoidPtr(restored_of(self).address);
}

PyObject* buffer_nbytes(PyObject* self, void*) {
  return PyLong_FromUnsignedLongLong(restored_of(self).nbytes);
}

PyObject* buffer_forwarded(PyObject* self, void*) {
  return PyBool_FromLong(restored_of(self).forwarded);
}

int buffer_export(PyObject* self, Py_buffer* view, int flags) {
  const Restored& restored = restored_of(self);
  return PyBuffer_FillInfo(view, self, restored.address, static_cast<Py_ssize_t>(restored.nbytes),
                           /*readonly=*/0, flags);
}

bool append_integers(PyObject* tuple, std::vector<std::int64_t>& to) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  for (Py_ssize_t at = 0; at < count; ++at) {
    to.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, at)));
  }
  return PyErr_Occurred() == nullptr;
}

// dlpack(code, bits, size, stride), from the first byte on: see offload/_C.pyi.
PyObject* buffer_dlpack(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 4 || !PyTuple_Check(arguments[2]) || !PyTuple_Check(arguments[3]) ||
        PyTuple_GET_SIZE(arguments[2]) != PyTuple_GET_SIZE(arguments[3])) {
      PyErr_SetString(PyExc_TypeError,
                      "dlpack() takes code, bits, size, stride; size and stride are tuples of "
                      "equal length");
      return nullptr;
    }
    const long code = PyLong_AsLong(arguments[0]);
    const long bits = PyLong_AsLong(arguments[1]);
    std::vector<std::int64_t> sizes_and_strides;
    sizes_and_strides.reserve(2 * static_cast<std::size_t>(PyTuple_GET_SIZE(arguments[2])));
    if (!append_integers(arguments[2], sizes_and_strides)) return nullptr;
    if (!append_integers(arguments[3], sizes_and_strides)) return nullptr;
    if (PyErr_Occurred() != nullptr) return nullptr;
    const Restored& restored = restored_of(self);
    constexpr long kMax = std::numeric_limits<std::uint8_t>::max();
    if (code < 0 || code > kMax || bits < 0 || bits > kMax) {
      throw std::invalid_argument("code or bits is out of range");
    }
    return dlpack::capsule(restored.address, restored.nbytes, restored.slice,
                           {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits)},
                           std::move(sizes_and_strides));
  });
}

// ---- the types ---------------------------------------------------------------------------------

PyMethodDef extent_methods[] = {
    {"prefetch", extent_prefetch, METH_NOARGS, nullptr},
    {"fetch", extent_fetch, METH_NOARGS, nullptr},
    {"wait_written", extent_wait_written, METH_NOARGS, nullptr},
    {"staged", extent_staged, METH_NOARGS, nullptr},
    {"start_write", extent_start_write, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef extent_properties[] = {
    {"ready", extent_ready, nullptr, nullptr, nullptr},
    {"nbytes", extent_nbytes, nullptr, nullptr, nullptr},
    {"offset", extent_offset, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef buffer_methods[] = {
    // The C API's own way to put a function with three parameters into a table of two.
    {"dlpack", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(buffer_dlpack)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef buffer_properties[] = {
    {"address", buffer_address, nullptr, nullptr, nullptr},
    {"nbytes", buffer_nbytes, nullptr, nullptr, nullptr},
    {"forwarded", buffer_forwarded, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;

PyTypeObject* add_type(PyObject* module, PyType_Spec spec) {
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) return nullptr;
  if (PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type)) != 0) {
    Py_DECREF(type);
    return nullptr;
  }
  return reinterpret_cast<PyTypeObject*>(type);  // kept for the life of the process
}

}  // namespace

void set_os_error(const IoError& error) {
  PyObject* arguments = Py_BuildValue("(iss)", error.code(), error.what(), error.path().c_str());
  if (arguments == nullptr) return;
  PyErr_SetObject(PyExc_OSError, arguments);
  Py_DECREF(arguments);
}

bool add_extent_types(PyObject* module) {
  PyType_Slot extent_slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy<std::shared_ptr<Extent>>)},
      {Py_tp_methods, extent_methods},
      {Py_tp_getset, extent_properties},
      {0, nullptr},
  };
  PyType_Slot buffer_slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy<Restored>)},
      {Py_tp_methods, buffer_methods},
      {Py_tp_getset, buffer_properties},
      {Py_bf_getbuffer, reinterpret_cast<void*>(buffer_export)},
      {0, nullptr},
  };
  extent_type =
      add_type(module, {"offload._C.Extent", sizeof(ExtentObject), 0, kFlags, extent_slots});
  buffer_type =
      add_type(module, {"offload._C.Buffer", sizeof(BufferObject), 0, kFlags, buffer_slots});
  return extent_type != nullptr && buffer_type != nullptr;
}

PyObject* make_extent(std::shared_ptr<Extent> extent) {
  if (extent == nullptr) Py_RETURN_NONE;
  return make(extent_type, std::move(extent));
}

const Restored& restored_in(PyObject* buffer) {
  if (Py_TYPE(buffer) != buffer_type) throw std::invalid_argument("a Buffer is needed");
  return restored_of(buffer);
}

PyObject* make_buffer(Restored restored) {
  if (restored.slice == nullptr) Py_RETURN_NONE;
  return make(buffer_type, std::move(restored));
}

}  // namespace offload
