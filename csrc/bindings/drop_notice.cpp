#include "drop_notice.h"

namespace offload {
namespace {

struct DropNotice {
  PyObject_HEAD PyObject* inbox;  // a list
  PyObject* item;
  PyObject* settle;  // called without arguments, soon
  bool read;
};

// By the main thread, between two bytecodes: an exception raised here reaches the code it runs.
int call_settle(void* argument) {
  auto* settle = static_cast<PyObject*>(argument);
  PyObject* result = PyObject_CallNoArgs(settle);
  Py_DECREF(settle);
  Py_XDECREF(result);
  return result == nullptr ? -1 : 0;
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"inbox", "item", "settle", nullptr};
  PyObject* inbox = nullptr;
  PyObject* item = nullptr;
  PyObject* settle = nullptr;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!OO", const_cast<char**>(names),
                                   &PyList_Type, &inbox, &item, &settle)) {
    return nullptr;
  }
  auto* self = PyObject_New(DropNotice, type);
  if (self == nullptr) return nullptr;
  self->inbox = Py_NewRef(inbox);
  self->item = Py_NewRef(item);
  self->settle = Py_NewRef(settle);
  self->read = false;
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<DropNotice*>(object);
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);  // an exception may be under way
  const bool first = PyList_GET_SIZE(self->inbox) == 0;
  PyObject* entry = PyTuple_Pack(2, self->item, self->read ? Py_True : Py_False);
  if (entry == nullptr || PyList_Append(self->inbox, entry) != 0) PyErr_WriteUnraisable(object);
  Py_XDECREF(entry);
  if (first) {
    // Should the interpreter's list of calls be full, the next hook settles.
    Py_INCREF(self->settle);
    if (Py_AddPendingCall(call_settle, self->settle) != 0) Py_DECREF(self->settle);
  }
  PyErr_Restore(type, value, trace);
  Py_DECREF(self->inbox);
  Py_DECREF(self->item);
  Py_DECREF(self->settle);
  PyTypeObject* own_type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(own_type);
}

PyObject* get_read(PyObject* self, void*) {
  return PyBool_FromLong(reinterpret_cast<DropNotice*>(self)->read);
}

int set_read(PyObject* self, PyObject* value, void*) {
  const int read = value != nullptr ? PyObject_IsTrue(value) : 0;
  if (read < 0) return -1;
  reinterpret_cast<DropNotice*>(self)->read = read != 0;
  return 0;
}

PyGetSetDef properties[] = {
    {"read", get_read, set_read, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

bool add_drop_notice(PyObject* module) {
  PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
      {Py_tp_getset, properties},
      {0, nullptr},
  };
  PyType_Spec spec = {"offload._C.DropNotice", sizeof(DropNotice), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) return false;
  const int failed = PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type));
  Py_DECREF(type);
  return failed == 0;
}

}  // namespace offload
