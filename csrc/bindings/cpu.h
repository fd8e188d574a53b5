// What the parts of rlhf_kernels._cpu share: the kernels of the instruction set in use, and addresses
// from Python.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace rk {

extern Kernels active;

// From the most capable on; what this machine cannot run is left out.
const std::vector<Kernels>& runnable();

// Throws std::invalid_argument for a name that is not among them.
void use_isa(const std::string& name);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline RowsIn rows_in(uintptr_t data, int type, int64_t rows, int64_t columns,
                      int64_t row_stride) {
  return {pointer<const void>(data), ElementType(type), rows, columns, row_stride};
}

// Adds the layers of transformers to the module.
void define_layers(pybind11::module_& module);

}  // namespace rk
