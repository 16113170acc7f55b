// The Python module. Loading it registers the ops; it has one function, info(), which says what was built.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <string>

#include "cpu/dispatch.h"

#ifndef ALIASFUSED_CUDA_ARCHITECTURES
#define ALIASFUSED_CUDA_ARCHITECTURES ""
#endif

namespace {

PyObject* info(PyObject*, PyObject*) {
  try {
    const std::string text =
        std::string("cpu=") + aliasfused::cpu_kernels().name + " of " + aliasfused::cpu_isas() + ";cuda=" ALIASFUSED_CUDA_ARCHITECTURES;
    return PyUnicode_FromString(text.c_str());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"info", info, METH_NOARGS, "The instruction sets and architectures this object was built for."}, {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
