// The Python module dancegrpo_fast._native. Compiled without torch: noise takes raw pointers, the
// ops read tensors through tensor.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "noise_cpu.h"
#include "normal.h"

namespace py = pybind11;

namespace {

void normal(uintptr_t out, int dtype, uintptr_t keys, int64_t n, int64_t base,
            const std::vector<int64_t>& extents, const std::vector<int64_t>& strides,
            int threads) {
  if (extents.empty() || extents.size() != strides.size() || strides.back() != 1)
    throw std::invalid_argument("extents and strides must be of one length, ending in stride 1");
  if (dtype < 0 || dtype > static_cast<int>(dg::Dtype::float64))
    throw std::invalid_argument("unknown dtype number");
  const dg::Runs runs{base, static_cast<int>(extents.size()), extents.data(), strides.data()};
  py::gil_scoped_release release;
  dg::normal_cpu(reinterpret_cast<void*>(out), static_cast<dg::Dtype>(dtype),
                 reinterpret_cast<const uint64_t*>(keys), n, runs, threads);
}

std::vector<uint32_t> philox(const std::vector<uint32_t>& counter, uint64_t seed) {
  if (counter.size() != 4) throw std::invalid_argument("counter: needs 4 words");
  const dg::Words x = dg::philox({counter[0], counter[1], counter[2], counter[3]},
                                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {x.x0, x.x1, x.x2, x.x3};
}

py::tuple box_muller(uint32_t x0, uint32_t x1) {
  const dg::Pair z = dg::box_muller(x0, x1);
  return py::make_tuple(z.z0, z.z1);
}

py::dict build() {
  py::dict d;
#ifdef __clang__
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
#ifdef _OPENMP
  d["openmp"] = true;
#else
  d["openmp"] = false;
#endif
#ifdef DG_TARGET_CLONES
  d["instruction_sets"] = "baseline, x86-64-v3, x86-64-v4";
#else
  d["instruction_sets"] = "baseline";
#endif
  return d;
}

}  // namespace

#ifdef DG_CUDA
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of dancegrpo_fast; call them through dancegrpo_fast.ops.";
  m.def("normal", &normal, "Fill memory with exact normals; see csrc/noise_cpu.h.");
  m.def("philox", &philox, "One Philox-4x32-10 block of any counter, for known-answer tests.");
  m.def("box_muller", &box_muller, "Two normals from two words, for known-answer tests.");
  m.def("usable_threads", &dg::usable_threads, "Threads a call would use: 1 in a forked child.");
  m.def("build", &build, "How this module was compiled.");
  dg::bind_ops(m);
#ifdef DG_CUDA
  bind_cuda(m);
#endif
}
