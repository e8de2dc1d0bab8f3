#include "view_type.h"

#include <structmember.h>

#include <cstddef>
#include <cstdint>

namespace offload {
namespace {

constexpr Py_ssize_t kInlineDims = 4;

struct View {
  PyObject_HEAD PyObject* inbox;  // a list
  PyObject* settle;               // called without arguments, soon after the inbox has an entry
  PyObject* region;
  PyObject* dtype;
  Py_ssize_t offset;
  Py_ssize_t ndim;
  std::int64_t* dims;  // sizes, then strides
  std::int64_t inline_dims[2 * kInlineDims];
  char conj, neg, read;
};

// By the main thread, between two bytecodes: an exception raised here reaches the code it runs.
int call_settle(void* argument) {
  auto* settle = static_cast<PyObject*>(argument);
  PyObject* result = PyObject_CallNoArgs(settle);
  Py_DECREF(settle);
  Py_XDECREF(result);
  return result == nullptr ? -1 : 0;
}

void release(PyObject* object) {
  auto* self = reinterpret_cast<View*>(object);
  if (self->dims != self->inline_dims) PyMem_Free(self->dims);
  for (PyObject* held : {self->inbox, self->settle, self->region, self->dtype}) Py_XDECREF(held);
  PyTypeObject* type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(type);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<View*>(object);
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);  // an exception may be under way
  const bool first = PyList_GET_SIZE(self->inbox) == 0;
  PyObject* entry = PyTuple_Pack(2, self->region, self->read ? Py_True : Py_False);
  if (entry == nullptr || PyList_Append(self->inbox, entry) != 0) PyErr_WriteUnraisable(object);
  Py_XDECREF(entry);
  if (first) {
    // Should the interpreter's list of calls be full, the next hook settles.
    Py_INCREF(self->settle);
    if (Py_AddPendingCall(call_settle, self->settle) != 0) Py_DECREF(self->settle);
  }
  PyErr_Restore(type, value, trace);
  release(object);
}

bool take_dims(View* self, PyObject* sizes, PyObject* strides) {
  self->ndim = PyTuple_GET_SIZE(sizes);
  if (self->ndim > kInlineDims) {
    auto* more = PyMem_New(std::int64_t, 2 * static_cast<std::size_t>(self->ndim));
    if (more == nullptr) {
      PyErr_NoMemory();
      return false;
    }
    self->dims = more;
  }
  for (Py_ssize_t dim = 0; dim < self->ndim; ++dim) {
    self->dims[dim] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, dim));
    self->dims[self->ndim + dim] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, dim));
  }
  return PyErr_Occurred() == nullptr;
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"inbox",  "settle", "region", "dtype", "size",
                                "stride", "offset", "conj",   "neg",   nullptr};
  PyObject *inbox, *settle, *region, *dtype, *sizes, *strides;
  Py_ssize_t offset = 0;
  int conj = 0;
  int neg = 0;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!OOOO!O!npp", const_cast<char**>(names),
                                   &PyList_Type, &inbox, &settle, &region, &dtype, &PyTuple_Type,
                                   &sizes, &PyTuple_Type, &strides, &offset, &conj, &neg)) {
    return nullptr;
  }
  if (PyTuple_GET_SIZE(sizes) != PyTuple_GET_SIZE(strides)) {
    PyErr_SetString(PyExc_ValueError, "size and stride must be of equal length");
    return nullptr;
  }
  auto* self = PyObject_New(View, type);
  if (self == nullptr) return nullptr;
  self->inbox = Py_NewRef(inbox);
  self->settle = Py_NewRef(settle);
  self->region = Py_NewRef(region);
  self->dtype = Py_NewRef(dtype);
  self->offset = offset;
  self->conj = static_cast<char>(conj);
  self->neg = static_cast<char>(neg);
  self->read = 0;
  self->dims = self->inline_dims;
  if (!take_dims(self, sizes, strides)) {
    release(reinterpret_cast<PyObject*>(self));  // it was never handed out: no notice
    return nullptr;
  }
  return reinterpret_cast<PyObject*>(self);
}

PyObject* tuple_of(const std::int64_t* values, Py_ssize_t count) {
  PyObject* tuple = PyTuple_New(count);
  for (Py_ssize_t at = 0; tuple != nullptr && at < count; ++at) {
    PyObject* value = PyLong_FromLongLong(values[at]);
    if (value == nullptr) {
      Py_CLEAR(tuple);
    } else {
      PyTuple_SET_ITEM(tuple, at, value);
    }
  }
  return tuple;
}

PyObject* get_size(PyObject* object, void*) {
  auto* self = reinterpret_cast<View*>(object);
  return tuple_of(self->dims, self->ndim);
}

PyObject* get_stride(PyObject* object, void*) {
  auto* self = reinterpret_cast<View*>(object);
  return tuple_of(self->dims + self->ndim, self->ndim);
}

PyMemberDef members[] = {
    {"region", T_OBJECT_EX, offsetof(View, region), READONLY, nullptr},
    {"dtype", T_OBJECT_EX, offsetof(View, dtype), READONLY, nullptr},
    {"offset", T_PYSSIZET, offsetof(View, offset), READONLY, nullptr},
    {"conj", T_BOOL, offsetof(View, conj), READONLY, nullptr},
    {"neg", T_BOOL, offsetof(View, neg), READONLY, nullptr},
    {"read", T_BOOL, offsetof(View, read), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"size", get_size, nullptr, nullptr, nullptr},
    {"stride", get_stride, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

bool add_view_type(PyObject* module) {
  PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
      {Py_tp_members, members},
      {Py_tp_getset, properties},
      {0, nullptr},
  };
  PyType_Spec spec = {"offload._C.SavedView", sizeof(View), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) return false;
  const int failed = PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type));
  Py_DECREF(type);
  return failed == 0;
}

}  // namespace offload
