// What the files of bindings add to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace dg {

void bind_ops(pybind11::module_& m);

}  // namespace dg
