// Makes the extension a Python module: importing fastvit._C loads it, and with it the operators that library.cpp
// registers. Only CPython's limited API of 3.11 is used, so one file serves every later version.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "fastvit's CUDA kernels.", -1};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "ARCHITECTURES", FASTVIT_ARCHITECTURES);  // "8.0 9.0a"
    PyModule_AddStringConstant(module, "CUDA", FASTVIT_CUDA);  // the compiler's version
  }
  return module;
}
