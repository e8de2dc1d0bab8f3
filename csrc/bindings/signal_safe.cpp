#include "signal_safe.h"

namespace offload {
namespace {

struct TryLock {
  PyObject_HEAD PyObject* lock;
  bool taken;
};

PyObject* make_lock(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"lock", nullptr};
  PyObject* lock = nullptr;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", const_cast<char**>(names), &lock)) {
    return nullptr;
  }
  auto* self = PyObject_New(TryLock, type);
  if (self == nullptr) return nullptr;
  self->lock = Py_NewRef(lock);
  self->taken = false;
  return reinterpret_cast<PyObject*>(self);
}

void destroy_lock(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  Py_DECREF(reinterpret_cast<TryLock*>(object)->lock);
  PyObject_Free(object);
  Py_DECREF(type);
}

// What a call says, as 0 or 1; -1 with a Python error set.
int truth(PyObject* result) {
  if (result == nullptr) return -1;
  const int yes = PyObject_IsTrue(result);
  Py_DECREF(result);
  return yes;
}

PyObject* enter(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<TryLock*>(object);
  const int owned = truth(PyObject_CallMethod(self->lock, "_is_owned", nullptr));
  if (owned < 0) return nullptr;
  if (owned == 0) {
    const int taken = truth(PyObject_CallMethod(self->lock, "acquire", "O", Py_False));
    if (taken < 0) return nullptr;
    self->taken = taken == 1;
  }
  return PyBool_FromLong(self->taken);
}

PyObject* leave(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<TryLock*>(object);
  if (self->taken) {
    self->taken = false;
    PyObject* result = PyObject_CallMethod(self->lock, "release", nullptr);
    if (result == nullptr) return nullptr;
    Py_DECREF(result);
  }
  Py_RETURN_NONE;
}

PyMethodDef lock_methods[] = {
    {"__enter__", enter, METH_NOARGS, nullptr},
    {"__exit__", leave, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ---- HeldKeys ----------------------------------------------------------------------------------

struct HeldKeys {
  PyObject_HEAD PyObject* free;  // called with each key, once
  PyObject* keys;                // a list of integers
};

PyObject* make_keys(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"free", nullptr};
  PyObject* free = nullptr;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", const_cast<char**>(names), &free)) {
    return nullptr;
  }
  PyObject* keys = PyList_New(0);
  if (keys == nullptr) return nullptr;
  auto* self = PyObject_New(HeldKeys, type);
  if (self == nullptr) {
    Py_DECREF(keys);
    return nullptr;
  }
  self->free = Py_NewRef(free);
  self->keys = keys;
  return reinterpret_cast<PyObject*>(self);
}

PyObject* append_key(PyObject* object, PyObject* key) {
  if (PyList_Append(reinterpret_cast<HeldKeys*>(object)->keys, key) != 0) return nullptr;
  Py_RETURN_NONE;
}

void free_all(HeldKeys* self) {
  PyObject* keys = self->keys;
  for (Py_ssize_t at = PyList_GET_SIZE(keys); at-- > 0;) {
    PyObject* key = Py_NewRef(PyList_GET_ITEM(keys, at));
    if (PyList_SetSlice(keys, at, at + 1, nullptr) != 0) PyErr_WriteUnraisable(self->free);
    PyObject* result = PyObject_CallOneArg(self->free, key);
    if (result == nullptr) PyErr_WriteUnraisable(self->free);
    Py_XDECREF(result);
    Py_DECREF(key);
  }
}

PyObject* free_keys(PyObject* object, PyObject*) {
  free_all(reinterpret_cast<HeldKeys*>(object));
  Py_RETURN_NONE;
}

Py_ssize_t count_keys(PyObject* object) {
  return PyList_GET_SIZE(reinterpret_cast<HeldKeys*>(object)->keys);
}

void destroy_keys(PyObject* object) {
  auto* self = reinterpret_cast<HeldKeys*>(object);
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);  // an exception may be under way
  free_all(self);
  PyErr_Restore(type, value, trace);
  Py_DECREF(self->free);
  Py_DECREF(self->keys);
  PyTypeObject* own_type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(own_type);
}

PyMethodDef key_methods[] = {
    {"append", append_key, METH_O, nullptr},
    {"free", free_keys, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ---- HookScope ---------------------------------------------------------------------------------

PyObject* enter_scope(PyObject* self, PyObject*) {
  PyObject* push = PyObject_CallMethod(self, "_begin", nullptr);
  if (push == nullptr) return nullptr;
  // From here to the body of the `with` statement, and from its end until the hooks are gone, only
  // native code runs: no handler gets in between.
  PyObject* pushed = nullptr;
  if (PyObject_SetAttrString(self, "active", Py_True) == 0) pushed = PyObject_CallNoArgs(push);
  Py_DECREF(push);
  if (pushed == nullptr) return nullptr;
  Py_DECREF(pushed);
  return Py_NewRef(self);
}

PyObject* leave_scope(PyObject* self, PyObject* exception) {
  if (PyObject_SetAttrString(self, "active", Py_False) != 0) return nullptr;
  PyObject* popped = PyObject_CallMethod(self, "_pop", nullptr);
  if (popped == nullptr) return nullptr;
  Py_DECREF(popped);
  PyObject* end = PyObject_GetAttrString(self, "_end");
  if (end == nullptr) return nullptr;
  PyObject* result = PyObject_Call(end, exception, nullptr);
  Py_DECREF(end);
  return result;
}

PyMethodDef scope_methods[] = {
    {"__enter__", enter_scope, METH_NOARGS, nullptr},
    {"__exit__", leave_scope, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

bool add(PyObject* module, PyType_Spec spec) {
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) return false;
  const int failed = PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type));
  Py_DECREF(type);
  return failed == 0;
}

}  // namespace

bool add_signal_safe_types(PyObject* module) {
  PyType_Slot lock_slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make_lock)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy_lock)},
      {Py_tp_methods, lock_methods},
      {0, nullptr},
  };
  PyType_Slot key_slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make_keys)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy_keys)},
      {Py_tp_methods, key_methods},
      {Py_sq_length, reinterpret_cast<void*>(count_keys)},
      {0, nullptr},
  };
  PyType_Slot scope_slots[] = {
      {Py_tp_methods, scope_methods},
      {0, nullptr},
  };
  return add(module, {"offload._C.HookScope", sizeof(PyObject), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, scope_slots}) &&
         add(module, {"offload._C.TryLock", sizeof(TryLock), 0, Py_TPFLAGS_DEFAULT, lock_slots}) &&
         add(module, {"offload._C.HeldKeys", sizeof(HeldKeys), 0, Py_TPFLAGS_DEFAULT, key_slots});
}

}  // namespace offload
