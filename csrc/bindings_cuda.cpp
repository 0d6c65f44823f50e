// The CUDA part of dancegrpo_fast._native, present where nvcc was: raw pointers of device memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "noise_cuda.h"

namespace py = pybind11;

namespace {

void check(int device, const std::string& error) {
  if (!error.empty())
    throw std::runtime_error("CUDA noise on device " + std::to_string(device) + ": " + error);
}

dg::Runs runs_of(int64_t base, const std::vector<int64_t>& extents,
                 const std::vector<int64_t>& strides) {
  if (extents.empty() || extents.size() != strides.size() || strides.back() != 1)
    throw std::invalid_argument("extents and strides must be of one length, ending in stride 1");
  if (extents.size() > dg::kMaxCudaDims)
    throw std::invalid_argument("the box has " + std::to_string(extents.size()) +
                                " dimensions that do not join in memory: at most " +
                                std::to_string(dg::kMaxCudaDims));
  return {base, static_cast<int>(extents.size()), extents.data(), strides.data()};
}

dg::CudaDraw draw_of(uintptr_t memory, int dtype, uintptr_t keys, int64_t n, int64_t copies,
                     const dg::Runs& runs, int device, uintptr_t stream) {
  if (dtype < 0 || dtype > static_cast<int>(dg::Dtype::float64))
    throw std::invalid_argument("unknown dtype number");
  return {reinterpret_cast<void*>(memory), static_cast<dg::Dtype>(dtype),
          reinterpret_cast<const uint64_t*>(keys), n, copies, runs, device, stream};
}

void normal_cuda(uintptr_t out, int dtype, uintptr_t keys, int64_t n, int64_t copies, int64_t base,
                 const std::vector<int64_t>& extents, const std::vector<int64_t>& strides,
                 int device, uintptr_t stream) {
  const dg::Runs runs = runs_of(base, extents, strides);
  const dg::CudaDraw draw = draw_of(out, dtype, keys, n, copies, runs, device, stream);
  py::gil_scoped_release release;
  check(device, dg::normal_cuda(draw));
}

void add_normal_cuda(uintptr_t x, int dtype, uintptr_t keys, int64_t n, int64_t base,
                     const std::vector<int64_t>& extents, const std::vector<int64_t>& strides,
                     float scale, uintptr_t scales, int device, uintptr_t stream) {
  const dg::Runs runs = runs_of(base, extents, strides);
  const dg::CudaDraw draw = draw_of(x, dtype, keys, n, 1, runs, device, stream);
  if (draw.dtype == dg::Dtype::float64) throw std::invalid_argument("float64 has no addition");
  py::gil_scoped_release release;
  check(device, dg::add_normal_cuda(draw, scale, reinterpret_cast<const float*>(scales)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("normal_cuda", &normal_cuda, "Fill device memory with exact normals; see noise_cuda.h.");
  m.def("add_normal_cuda", &add_normal_cuda, "Add scaled normals in place; see noise_cuda.h.");
  m.def(
      "load_cuda", [](int device) { check(device, dg::load_cuda(device)); },
      py::call_guard<py::gil_scoped_release>(),
      "Load the kernels on a device; RuntimeError with CUDA's words if it cannot run them.");
  m.attr("cuda_build") = py::dict(py::arg("toolkit") = DG_CUDA_TOOLKIT,
                                  py::arg("architectures") = DG_CUDA_ARCHS);
}
