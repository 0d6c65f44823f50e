// What the bindings of all ops share: small tensors read into vectors, latents into a Batch.
//
// What memory safety and the contract need is checked here, in one short line; the public wrappers
// word the errors for users.
#pragma once
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "ops_cpu.h"
#include "tensor.h"

namespace dg {

namespace py = pybind11;

inline void require(bool condition, const char* otherwise) {
  if (!condition) throw Refused(otherwise);
}

// Waiting for the GIL again costs more than a small call.
struct Released {
  std::optional<py::gil_scoped_release> gil;
  explicit Released(int64_t elements) {
    if (elements > kSerialElements) gil.emplace();
  }
};

// ------------------------------------------------------------------ small tensors

inline double element(const View& v, int64_t at) {
  switch (v.dtype) {
    case Dtype::float32:
      return static_cast<const float*>(v.data)[at];
    case Dtype::float64:
      return static_cast<const double*>(v.data)[at];
    default: {
      float value;
      widen(&value, static_cast<const uint16_t*>(v.data) + at, v.dtype, 1);
      return value;
    }
  }
}

// All elements of a tensor of rank 0 to 3, in order.
template <class T>
std::vector<T> values(const View& v, const char* name) {
  if (v.kind != Kind::floating) throw Refused(std::string(name) + " is not of a floating dtype");
  int64_t n[3] = {1, 1, 1}, step[3] = {};
  for (int d = 0, to = 3 - v.rank; d < v.rank; ++d, ++to) {
    n[to] = v.shape[d];
    step[to] = v.strides[d];
  }
  std::vector<T> result;
  result.reserve(n[0] * n[1] * n[2]);
  for (int64_t i = 0; i < n[0]; ++i)
    for (int64_t j = 0; j < n[1]; ++j)
      for (int64_t k = 0; k < n[2]; ++k)
        result.push_back(static_cast<T>(element(v, i * step[0] + j * step[1] + k * step[2])));
  return result;
}

// [count], or empty for None
template <class T>
std::vector<T> per_child(py::handle tensor, int64_t count, const char* name) {
  if (tensor.is_none()) return {};
  const View v = read(tensor, name);
  if (!v.is({count})) throw Refused(std::string(name) + " has the wrong shape");
  return values<T>(v, name);
}

template <class T>
const T* pointer(const std::vector<T>& given, py::handle argument) {
  return argument.is_none() ? nullptr : given.data();
}

inline std::vector<int64_t> integers(const View& v) {
  std::vector<int64_t> result;
  const int64_t columns = v.rank > 1 ? v.shape[1] : 1, step = v.rank > 1 ? v.strides[1] : 0;
  for (int64_t i = 0; i < v.shape[0]; ++i)
    for (int64_t j = 0; j < columns; ++j)
      result.push_back(static_cast<const int64_t*>(v.data)[i * v.strides[0] + j * step]);
  return result;
}

template <class T>
T number(py::handle value, const char* otherwise) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw Refused(otherwise);
  }
}

inline double divisor_of(py::handle divisor) {
  if (divisor.is_none()) return 0;
  const auto value = number<double>(divisor, "divisor must be a positive number");
  require(value > 0 && std::isfinite(value), "divisor must be a positive number");
  return value;
}

template <class T>
void check_weights(const std::vector<T>& weights, int64_t count, py::handle argument,
                   double divisor) {
  double sum = argument.is_none() ? static_cast<double>(count) : 0;
  for (const T weight : weights) {
    require(!(weight < 0), "weights must be at least 0");
    sum += weight;
  }
  require(divisor > 0 || sum > 0, "weights sum to 0 and divisor is None");
}

template <class T>
struct Result {
  py::object tensor;
  T* data = nullptr;

  Result() : tensor(py::none()) {}
  Result(std::initializer_list<int64_t> shape) {
    constexpr Dtype dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
    Fresh fresh = allocate(dtype, static_cast<int>(shape.size()), shape.begin());
    tensor = std::move(fresh.tensor);
    data = static_cast<T*>(fresh.data);
  }
};

// ------------------------------------------------------------------ latents

// The layout that the ops share: model output m [states, dims], latents x likewise.
struct Call {
  Batch batch;
  int dims;
  int64_t sizes[kMaxDims], start[kMaxDims], stop[kMaxDims];
  bool whole = true;       // the box is the latent
  bool is_double = false;  // a latent-sized input is float64
  View m_view;
  std::vector<int64_t> offsets;
  std::vector<Operand*> operands;

  Call(const Call&) = delete;  // `operands` points into it
  Call(py::handle m, py::handle x, py::handle box, int threads) : m_view(read(m, "model_output")) {
    require(m_view.rank >= 2, "model_output needs at least 2 dimensions");
    dims = m_view.rank - 1;
    std::copy_n(m_view.shape + 1, dims, sizes);
    batch.families.states = batch.families.children = m_view.shape[0];
    batch.threads = threads;
    set_box(box);
    add(batch.m, m_view, states(), "model_output");
    add(batch.x, read(x, "latents"), states(), "latents");
  }

  int64_t states() const { return batch.families.states; }
  int64_t children() const { return batch.families.children; }
  int64_t elements(int64_t rows) const {
    for (int d = 0; d < dims; ++d) rows *= sizes[d];
    return rows;
  }
  int64_t work() const { return std::max(states(), children()) * batch.grid.elements; }

  void set_box(py::handle box) {
    std::fill_n(start, dims, 0);
    std::copy_n(sizes, dims, stop);
    if (!box.is_none()) {
      require(PySequence_Check(box.ptr()) && PySequence_Size(box.ptr()) == dims,
              "action_box needs one (start, stop) per dimension of a latent");
      for (int d = 0; d < dims; ++d) {
        constexpr const char* otherwise = "action_box needs integers (start, stop)";
        const auto pair =
            number<py::sequence>(py::reinterpret_borrow<py::sequence>(box)[d], otherwise);
        require(pair.size() == 2, otherwise);
        start[d] = number<int64_t>(pair[0], otherwise);
        stop[d] = number<int64_t>(pair[1], otherwise);
      }
    }
    for (int d = 0; d < dims; ++d) {
      require(0 <= start[d] && start[d] < stop[d] && stop[d] <= sizes[d],
              "action_box must satisfy 0 <= start < stop <= size");
      whole = whole && start[d] == 0 && stop[d] == sizes[d];
    }
  }

  void set_children(int64_t count, py::handle child_offsets) {
    batch.families.children = count;
    if (child_offsets.is_none())
      return require(count == states(), "one child each: rows != states");
    const View v = read(child_offsets, "child_offsets");
    require(v.kind == Kind::int64 && v.is({states() + 1}), "child_offsets: int64 [states + 1]");
    offsets = integers(v);
    require(offsets.front() == 0 && offsets.back() == count, "child_offsets: 0 to children");
    for (size_t i = 1; i < offsets.size(); ++i)
      require(offsets[i - 1] <= offsets[i], "child_offsets must not fall");
    batch.families.offsets = offsets.data();
  }

  Operand operand(const View& v) const {
    Operand o;
    o.data = v.data;
    o.dtype = v.dtype;
    o.row = v.strides[0];
    std::copy_n(v.strides + 1, dims, o.strides);
    return o;
  }

  void add(Operand& slot, const View& v, int64_t rows, const char* name) {
    require(v.kind == Kind::floating, "latents must be bfloat16, float16, float32 or float64");
    if (v.rank != dims + 1 || v.shape[0] != rows || !std::equal(sizes, sizes + dims, v.shape + 1))
      throw Refused(std::string(name) + " has the wrong shape");
    slot = operand(v);
    is_double = is_double || v.dtype == Dtype::float64;
    // An empty tensor may have no address, but it is there.
    static const char nothing = 0;
    if (!slot.data) slot.data = &nothing;
    operands.push_back(&slot);
  }

  void add(Operand& slot, py::handle tensor, int64_t rows, const char* name) {
    if (!tensor.is_none()) add(slot, read(tensor, name), rows, name);
  }

  // A new tensor [rows, dims]; with strides null contiguous.
  py::object add_result(Operand& slot, Dtype dtype, int64_t rows, const int64_t* strides) {
    View v;
    v.rank = dims + 1;
    v.dtype = dtype;
    v.shape[0] = rows;
    std::copy_n(sizes, dims, v.shape + 1);
    int64_t step = 1;
    for (int d = dims; d >= 0; --d) {
      v.strides[d] = strides ? strides[d] : step;
      step *= v.shape[d];
    }
    Fresh fresh = allocate(dtype, v.rank, v.shape, strides);
    v.data = fresh.data;
    slot = operand(v);
    operands.push_back(&slot);
    return fresh.tensor;
  }

  // Once everything is added.
  void collapse() { batch.grid = Grid(dims, start, stop, operands); }
};

inline View read_table(Call& call, py::handle coefficients, py::handle offsets) {
  const View v = read(coefficients, "coefficients");
  require(v.rank == 2 && v.shape[1] == kCoefficients, "coefficients: [children, 8]");
  call.set_children(v.shape[0], offsets);
  return v;
}

template <class Body>
auto with_type(const Call& call, const Body& body) -> decltype(body(float())) {
  return call.is_double ? body(double()) : body(float());
}

}  // namespace dg
