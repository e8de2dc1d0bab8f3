#include "view_type.h"

#include <structmember.h>

#include <cstddef>
#include <cstdint>

namespace offload {
namespace {

constexpr Py_ssize_t kInlineDims = 4;

// Regions of views that ended, by whether somebody had asked for the view.
struct Box {
  PyObject_HEAD PyObject* unread;  // a list
  PyObject* read;                  // another
  PyObject* settle;                // called without arguments, soon after a view has ended
  bool scheduled;
};

struct View {
  PyObject_HEAD Box* box;
  PyObject* region;
  PyObject* dtype;
  Py_ssize_t offset;
  Py_ssize_t ndim;
  std::int64_t* dims;  // sizes, then strides
  std::int64_t inline_dims[2 * kInlineDims];
  char conj, neg, read;
};

PyTypeObject* box_type = nullptr;

// ---- DropBox -----------------------------------------------------------------------------------

PyObject* make_box(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"settle", nullptr};
  PyObject* settle = nullptr;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", const_cast<char**>(names), &settle)) {
    return nullptr;
  }
  auto* self = reinterpret_cast<Box*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->settle = Py_NewRef(settle);
  self->unread = PyList_New(0);
  self->read = PyList_New(0);
  if (self->unread == nullptr || self->read == nullptr) {
    Py_DECREF(self);
    return nullptr;
  }
  return reinterpret_cast<PyObject*>(self);
}

int traverse_box(PyObject* object, visitproc visit, void* arg) {
  auto* self = reinterpret_cast<Box*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->unread);
  Py_VISIT(self->read);
  Py_VISIT(self->settle);
  return 0;
}

// The lists stay: views that still live end in them.
int clear_box(PyObject* object) {
  Py_CLEAR(reinterpret_cast<Box*>(object)->settle);
  return 0;
}

void destroy_box(PyObject* object) {
  auto* self = reinterpret_cast<Box*>(object);
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  Py_CLEAR(self->settle);
  Py_CLEAR(self->unread);
  Py_CLEAR(self->read);
  type->tp_free(object);
  Py_DECREF(type);
}

int box_is_full(PyObject* object) {
  auto* self = reinterpret_cast<Box*>(object);
  return PyList_GET_SIZE(self->unread) + PyList_GET_SIZE(self->read) > 0;
}

// By the main thread, between two bytecodes: an exception raised here reaches the code it runs.
int call_settle(void* argument) {
  auto* box = static_cast<Box*>(argument);
  box->scheduled = false;
  PyObject* result = box->settle == nullptr ? Py_NewRef(Py_None) : PyObject_CallNoArgs(box->settle);
  Py_DECREF(box);
  Py_XDECREF(result);
  return result == nullptr ? -1 : 0;
}

// Allocates nothing that the garbage collector tracks: a collection may run Python code.
void put(Box* box, PyObject* region, bool read) {
  if (PyList_Append(read ? box->read : box->unread, region) != 0) {
    PyErr_WriteUnraisable(reinterpret_cast<PyObject*>(box));
  }
  if (box->scheduled) return;
  Py_INCREF(box);
  // Should the interpreter's list of calls be full, the next view to end tries again.
  box->scheduled = Py_AddPendingCall(call_settle, box) == 0;
  if (!box->scheduled) Py_DECREF(box);
}

PyMemberDef box_members[] = {
    {"unread", T_OBJECT_EX, offsetof(Box, unread), READONLY, nullptr},
    {"read", T_OBJECT_EX, offsetof(Box, read), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

// ---- SavedView ---------------------------------------------------------------------------------

void release(PyObject* object) {
  auto* self = reinterpret_cast<View*>(object);
  if (self->dims != self->inline_dims) PyMem_Free(self->dims);
  Py_DECREF(self->box);
  Py_DECREF(self->region);
  Py_DECREF(self->dtype);
  PyTypeObject* type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(type);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<View*>(object);
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);  // an exception may be under way
  put(self->box, self->region, self->read != 0);
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
  static const char* names[] = {"box",    "region", "dtype", "size", "stride",
                                "offset", "conj",   "neg",   nullptr};
  PyObject *box, *region, *dtype, *sizes, *strides;
  Py_ssize_t offset = 0;
  int conj = 0;
  int neg = 0;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!OOO!O!npp", const_cast<char**>(names),
                                   box_type, &box, &region, &dtype, &PyTuple_Type, &sizes,
                                   &PyTuple_Type, &strides, &offset, &conj, &neg)) {
    return nullptr;
  }
  if (PyTuple_GET_SIZE(sizes) != PyTuple_GET_SIZE(strides)) {
    PyErr_SetString(PyExc_ValueError, "size and stride must be of equal length");
    return nullptr;
  }
  auto* self = PyObject_New(View, type);
  if (self == nullptr) return nullptr;
  self->box = reinterpret_cast<Box*>(Py_NewRef(box));
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

bool add_view_types(PyObject* module) {
  PyType_Slot box_slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make_box)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy_box)},
      {Py_tp_traverse, reinterpret_cast<void*>(traverse_box)},
      {Py_tp_clear, reinterpret_cast<void*>(clear_box)},
      {Py_tp_members, box_members},
      {Py_nb_bool, reinterpret_cast<void*>(box_is_full)},
      {0, nullptr},
  };
  PyType_Slot view_slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
      {Py_tp_members, members},
      {Py_tp_getset, properties},
      {0, nullptr},
  };
  PyType_Spec box_spec = {"offload._C.DropBox", sizeof(Box), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, box_slots};
  PyType_Spec view_spec = {"offload._C.SavedView", sizeof(View), 0, Py_TPFLAGS_DEFAULT, view_slots};
  box_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&box_spec));  // kept for ever
  if (box_type == nullptr || PyModule_AddType(module, box_type) != 0) return false;
  PyObject* view_type = PyType_FromSpec(&view_spec);
  if (view_type == nullptr) return false;
  const int failed = PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(view_type));
  Py_DECREF(view_type);
  return failed == 0;
}

}  // namespace offload
