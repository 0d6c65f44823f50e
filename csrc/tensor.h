// PyTorch tensors without PyTorch's headers: read and allocated through DLPack's C exchange API
// (torch >= 2.10), else through Python attributes.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace dg {

// An argument that an op does not take; a ValueError in Python.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

constexpr int kMaxRank = kMaxDims + 1;

enum class Kind { floating, int64, other };

// A tensor's memory. Valid as long as the tensor is.
struct View {
  void* data = nullptr;
  Kind kind = Kind::other;
  Dtype dtype = Dtype::float32;  // if floating
  int rank = 0;
  int64_t shape[kMaxRank] = {}, strides[kMaxRank] = {};

  bool is(std::initializer_list<int64_t> sizes) const {
    return rank == static_cast<int>(sizes.size()) &&
           std::equal(sizes.begin(), sizes.end(), shape);
  }
};

// Only exactly torch.Tensor and Parameter on the CPU: what looks like a tensor but is not
// (FakeTensor, DTensor) has no memory to read. `name` is for the message.
View read(pybind11::handle tensor, const char* name);

// A new tensor; strides null: contiguous.
struct Fresh {
  pybind11::object tensor;
  void* data;
};
Fresh allocate(Dtype dtype, int rank, const int64_t* shape, const int64_t* strides = nullptr);

Dtype read_dtype(pybind11::handle torch_dtype, const char* name);

// For tests: whether to use the exchange API where torch has it. Returns whether it is in use.
bool use_exchange(bool wanted);

}  // namespace dg
