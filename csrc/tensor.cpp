#include "tensor.h"

namespace py = pybind11;

namespace dg {
namespace {

// The part of DLPack 1.x that we need, as its specification lays it out in memory.
namespace dlpack {

constexpr int32_t cpu = 1;
constexpr uint8_t signed_integer = 0, ieee_float = 2, bfloat = 4;

struct Device {
  int32_t type, id;
};
struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
using SetError = void (*)(void* context, const char* kind, const char* message);
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, Managed** out, void* error_context, SetError);
  int (*managed_from_object)(void* object, Managed** out);
  int (*to_object)(Managed*, void** object);
  int (*from_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace dlpack

constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16", "float64"};

struct Torch {
  py::object module, tensor, parameter, dtypes[4], int64, empty_strided, is_neg, cpu;
  const dlpack::ExchangeApi* api = nullptr;
  bool uses_api = false;

  Torch() : module(py::module_::import("torch")) {
    tensor = module.attr("Tensor");
    parameter = module.attr("nn").attr("Parameter");
    for (int i = 0; i < 4; ++i) dtypes[i] = module.attr(kDtypeNames[i]);
    int64 = module.attr("int64");
    empty_strided = module.attr("empty_strided");
    is_neg = tensor.attr("is_neg");
    cpu = module.attr("device")("cpu");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return;
    const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!pointer) throw py::error_already_set();
    api = static_cast<const dlpack::ExchangeApi*>(pointer);
    while (api && api->version.major > 1) api = api->previous;
    uses_api = api && api->version.major == 1 && api->from_object;
  }
};

Torch& torch() {
  // Under the GIL, so without a guard, which a thread could wait for while it holds the GIL. Never
  // destroyed: the interpreter may be gone by then.
  static Torch* loaded = nullptr;
  if (!loaded) loaded = new Torch;
  return *loaded;
}

[[noreturn]] void refuse(const std::string& message) { throw Refused(message); }

void set_rank(View& view, int64_t rank, const char* name) {
  if (rank > kMaxRank)
    refuse(std::string(name) + " has " + std::to_string(rank) + " dimensions: at most " +
           std::to_string(kMaxRank));
  view.rank = static_cast<int>(rank);
}

View read_exchange(py::handle tensor, const char* name) {
  dlpack::Tensor t;
  if (torch().api->from_object(tensor.ptr(), &t)) {
    const std::string reason = py::error_already_set().what();
    refuse(std::string(name) + " has no memory to read: " + reason.substr(0, reason.find('\n')));
  }
  if (t.device.type != dlpack::cpu) refuse(std::string(name) + " is not on the CPU");
  View view;
  set_rank(view, t.ndim, name);
  std::copy_n(t.shape, t.ndim, view.shape);
  std::copy_n(t.strides, t.ndim, view.strides);
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  const auto [code, bits, lanes] = t.dtype;
  if (lanes != 1) return view;
  if (code == dlpack::signed_integer && bits == 64) view.kind = Kind::int64;
  const bool half = code == dlpack::bfloat && bits == 16;
  if (half || (code == dlpack::ieee_float && (bits == 16 || bits == 32 || bits == 64))) {
    view.kind = Kind::floating;
    view.dtype = half         ? Dtype::bfloat16
                 : bits == 16 ? Dtype::float16
                 : bits == 32 ? Dtype::float32
                              : Dtype::float64;
  }
  return view;
}

View read_attributes(py::handle tensor, const char* name) {
  View view;
  if (tensor.attr("device").attr("type").cast<std::string>() != "cpu")
    refuse(std::string(name) + " is not on the CPU");
  if (!tensor.attr("layout").is(torch().module.attr("strided")))
    refuse(std::string(name) + " is not strided");
  const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  set_rank(view, static_cast<int64_t>(shape.size()), name);
  for (int d = 0; d < view.rank; ++d) {
    view.shape[d] = shape[d].cast<int64_t>();
    view.strides[d] = strides[d].cast<int64_t>();
  }
  const py::object dtype = tensor.attr("dtype");
  if (dtype.is(torch().int64)) view.kind = Kind::int64;
  for (int i = 0; i < 4; ++i)
    if (dtype.is(torch().dtypes[i])) view.kind = Kind::floating, view.dtype = static_cast<Dtype>(i);
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return view;
}

Fresh allocate_exchange(Dtype dtype, int rank, const int64_t* shape, const int64_t* strides) {
  static const dlpack::Type types[] = {{dlpack::ieee_float, 32, 1},
                                       {dlpack::bfloat, 16, 1},
                                       {dlpack::ieee_float, 16, 1},
                                       {dlpack::ieee_float, 64, 1}};
  int64_t sizes[kMaxRank] = {}, steps[kMaxRank] = {};
  std::copy_n(shape, rank, sizes);
  dlpack::Tensor prototype{};
  prototype.device = {dlpack::cpu, 0};
  prototype.ndim = rank;
  prototype.dtype = types[static_cast<int>(dtype)];
  prototype.shape = sizes;
  dlpack::Managed* made = nullptr;
  const auto set_error = [](void* context, const char*, const char* message) {
    *static_cast<std::string*>(context) = message;
  };
  std::string error;
  if (torch().api->allocate(&prototype, &made, &error, set_error))
    throw std::runtime_error("torch cannot allocate: " + error);
  void* data = static_cast<char*>(made->tensor.data) + made->tensor.byte_offset;
  if (strides) {
    // The allocator makes contiguous memory; the same memory in another order of dimensions.
    std::copy_n(strides, rank, steps);
    made->tensor.strides = steps;
  }
  void* object = nullptr;
  if (torch().api->to_object(made, &object)) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

Fresh allocate_attributes(Dtype dtype, int rank, const int64_t* shape, const int64_t* strides) {
  py::tuple sizes(rank), steps(rank);
  int64_t step = 1;
  for (int d = rank - 1; d >= 0; --d) {
    sizes[d] = shape[d];
    steps[d] = strides ? strides[d] : step;
    step *= std::max<int64_t>(shape[d], 1);
  }
  py::object tensor =
      torch().empty_strided(sizes, steps, py::arg("device") = torch().cpu,
                            py::arg("dtype") = torch().dtypes[static_cast<int>(dtype)]);
  const uintptr_t data = tensor.attr("data_ptr")().cast<uintptr_t>();
  return {std::move(tensor), reinterpret_cast<void*>(data)};
}

}  // namespace

View read(py::handle tensor, const char* name) {
  const Torch& t = torch();
  const PyObject* type = reinterpret_cast<const PyObject*>(Py_TYPE(tensor.ptr()));
  if (type != t.tensor.ptr() && type != t.parameter.ptr())
    refuse(std::string(name) + " is a " + Py_TYPE(tensor.ptr())->tp_name +
           ", which has no plain memory: must be a local torch.Tensor");
  // The imaginary part of a conjugate is real and has a lazy sign that DLPack does not tell.
  PyObject* const negative = PyObject_CallOneArg(t.is_neg.ptr(), tensor.ptr());
  if (!negative) throw py::error_already_set();
  Py_DECREF(negative);
  if (negative == Py_True)
    refuse(std::string(name) + " is a lazily negated view: call .resolve_neg()");
  return t.uses_api ? read_exchange(tensor, name) : read_attributes(tensor, name);
}

Fresh allocate(Dtype dtype, int rank, const int64_t* shape, const int64_t* strides) {
  return torch().uses_api ? allocate_exchange(dtype, rank, shape, strides)
                          : allocate_attributes(dtype, rank, shape, strides);
}

Dtype read_dtype(py::handle dtype, const char* name) {
  for (int i = 0; i < 4; ++i)
    if (dtype.is(torch().dtypes[i])) return static_cast<Dtype>(i);
  refuse(std::string(name) + " must be float32, bfloat16, float16 or float64");
}

bool use_exchange(bool wanted) {
  Torch& t = torch();
  return t.uses_api = wanted && t.api && t.api->from_object;
}

}  // namespace dg
