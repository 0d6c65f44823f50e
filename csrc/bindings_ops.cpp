// The five ops for Python: read and check tensors, allocate results, call ops_cpu.h.
#include "bindings.h"
#include "bindings_call.h"

namespace dg {
namespace {

constexpr int64_t kPastCacheElements = 1 << 21;  // 4 MiB of half precision

py::tuple op_sample(py::handle m, py::handle x, py::handle coefficients, py::handle keys,
                    py::handle noise, py::handle child_offsets, py::handle box,
                    py::handle out_dtype, int threads) {
  Call call(m, x, box, threads);
  const View table_view = read_table(call, coefficients, child_offsets);
  const bool is_double = call.is_double;  // m's or x's; noise is converted
  call.add(call.batch.noise, noise, call.children(), "noise");
  call.is_double = is_double;
  std::vector<int64_t> key_values;
  if (!keys.is_none()) {
    require(noise.is_none(), "keys and noise are both given");
    const View v = read(keys, "keys");
    require(v.kind == Kind::int64 && v.is({call.children(), 2}), "keys: int64 [children, 2]");
    key_values = integers(v);
  }
  int64_t step = 1;
  for (int d = call.dims - 1; d >= 0; --d) {
    call.batch.index.strides[d] = step;
    step *= call.sizes[d];
  }
  if (!keys.is_none()) call.operands.push_back(&call.batch.index);
  const Operand outer_x = call.batch.x;
  const Dtype dtype = read_dtype(out_dtype, "latent_dtype");
  const py::object y = call.add_result(call.batch.y, dtype, call.children(), nullptr);
  const Operand outer_y = call.batch.y;
  call.collapse();
  return with_type(call, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> table = values<T>(table_view, "coefficients");
    if (keys.is_none() && noise.is_none())
      for (int64_t c = 0; c < call.children(); ++c)
        require(!(table[c * kCoefficients + 2] > 0), "keys and noise are both None: s > 0");
    Result<T> log_prob{call.children()};
    {
      const Released released(call.work());
      sample_transition(call.batch, table.data(),
                        reinterpret_cast<const uint64_t*>(key_values.data()), log_prob.data);
      if (!call.whole)
        fill_outside<T>(call.batch.families, call.dims, call.sizes, call.start, call.stop, outer_y,
                        outer_x, threads);
    }
    return py::make_tuple(y, log_prob.tensor);
  });
}

py::object op_log_prob(py::handle m, py::handle x, py::handle y, py::handle coefficients,
                       py::handle child_offsets, py::handle box, int threads) {
  Call call(m, x, box, threads);
  const View table_view = read_table(call, coefficients, child_offsets);
  call.add(call.batch.y, y, call.children(), "next_latents");
  call.collapse();
  return with_type(call, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> table = values<T>(table_view, "coefficients");
    Result<T> log_prob{call.children()};
    {
      const Released released(call.work());
      transition_log_prob(call.batch, table.data(), log_prob.data);
    }
    return log_prob.tensor;
  });
}

// [children, R, 2]: advantages of one sign each. NaN is in both.
template <class T>
std::vector<T> advantage_parts(const View& v, int64_t children) {
  require(v.rank >= 1 && v.rank <= 3 && v.shape[0] == children && (v.rank < 3 || v.shape[2] == 2),
          "advantages: [children], [children, R] or [children, R, 2]");
  std::vector<T> given = values<T>(v, "advantages");
  if (v.rank < 3) {
    std::vector<T> parts;
    for (const T a : given) {
      parts.push_back(a < 0 ? T(0) : a);
      parts.push_back(a > 0 ? T(0) : a);
    }
    return parts;
  }
  for (size_t i = 0; i < given.size(); i += 2)
    require(!(given[i] < 0) && !(given[i + 1] > 0), "advantages must be (P >= 0, N <= 0)");
  return given;
}

// A child without density has no ratio.
template <class T>
void check_density(const std::vector<T>& table, const std::vector<T>& parts,
                   const std::vector<T>& weights, bool unweighted, int64_t children) {
  const size_t width = children ? parts.size() / children : 0;
  for (int64_t c = 0; c < children; ++c) {
    if (table[c * kCoefficients + 3] != 0) continue;
    bool used = unweighted || weights[c] != 0;
    for (size_t i = 0; i < width; ++i) used = used || parts[c * width + i] != 0;
    require(!used, "a child with w = 0 has an advantage or weight");
  }
}

py::tuple op_policy(py::handle m, py::handle x, py::handle y, py::handle coefficients,
                    py::handle advantages, py::handle old_log_prob, py::handle weights,
                    py::handle child_offsets, py::handle reward_weights, py::handle ref,
                    py::handle old, double low, double high, py::handle divisor, double kl_weight,
                    py::handle box, double power, py::handle old_penalty, bool with_scales,
                    int threads) {
  require(0 <= low && low <= 1 && 0 <= high && std::isfinite(high), "clip range");
  require(0 <= kl_weight && std::isfinite(kl_weight), "kl_weight must be finite, at least 0");
  require(kl_weight == 0 || !ref.is_none(), "kl_weight without reference_output");
  require(power != 0 && std::isfinite(power), "power must be finite and not 0");
  const bool penalises = !old_penalty.is_none();
  const double penalty =
      penalises ? number<double>(old_penalty, "old_penalty must be a number") : 0;
  require(0 <= penalty && std::isfinite(penalty), "old_penalty must be finite, at least 0");
  require(!penalises || !old.is_none(), "old_penalty without old_output");
  require(penalises || old.is_none() || !old_log_prob.is_none(), "old_output without old_log_prob");
  const double given_divisor = divisor_of(divisor);
  Call call(m, x, box, threads);
  const View table_view = read_table(call, coefficients, child_offsets);
  const int64_t count = call.children();
  call.add(call.batch.y, y, count, "next_latents");
  call.add(call.batch.ref, ref, call.states(), "reference_output");
  call.add(call.batch.old, old, call.states(), "old_output");
  call.collapse();
  const View advantage_view = read(advantages, "advantages");
  return with_type(call, [&](auto zero) {
    using T = decltype(zero);
    const auto table = values<T>(table_view, "coefficients");
    const auto parts = advantage_parts<T>(advantage_view, count);
    const int64_t rewards = advantage_view.rank > 1 ? advantage_view.shape[1] : 1;
    const auto old_lp = per_child<T>(old_log_prob, count, "old_log_prob");
    const auto weight = per_child<T>(weights, count, "weights");
    const auto u = per_child<T>(reward_weights, rewards, "reward_weights");
    check_weights(weight, count, weights, given_divisor);
    check_density(table, parts, weight, weights.is_none(), count);
    const PolicyArguments<T> args{table.data(), parts.data(), pointer(old_lp, old_log_prob),
                                  pointer(weight, weights), pointer(u, reward_weights), rewards,
                                  low, high, given_divisor, static_cast<T>(kl_weight),
                                  static_cast<T>(power), penalises, static_cast<T>(penalty)};
    Result<T> loss{std::initializer_list<int64_t>{}}, log_prob{count}, metrics{kPolicyMetrics};
    Result<T> scales = with_scales ? Result<T>{count, kScales} : Result<T>();
    {
      const Released released(call.work());
      policy_loss(call.batch, args, loss.data, log_prob.data, metrics.data, scales.data);
    }
    return py::make_tuple(loss.tensor, log_prob.tensor, metrics.tensor, scales.tensor);
  });
}

py::tuple op_nft(py::handle m, py::handle x, py::handle y, py::handle sigmas, py::handle advantages,
                 py::handle weights, py::handle ref, py::handle old, double beta, double adv_max,
                 py::handle divisor, double kl_weight, double minimum, py::handle box,
                 bool with_scales, int threads) {
  require(beta > 0 && std::isfinite(beta), "beta must be positive");
  require(adv_max > 0 && std::isfinite(adv_max), "adv_max must be positive");
  require(minimum >= 0 && std::isfinite(minimum), "minimum must be finite, at least 0");
  require(0 <= kl_weight && std::isfinite(kl_weight), "kl_weight must be finite, at least 0");
  require(kl_weight == 0 || !ref.is_none(), "kl_weight without reference_output");
  require(!old.is_none(), "old_output is needed");
  const double given_divisor = divisor_of(divisor);
  Call call(m, x, box, threads);
  const int64_t count = call.states();
  call.add(call.batch.y, y, count, "clean_latents");
  call.add(call.batch.ref, ref, count, "reference_output");
  call.add(call.batch.old, old, count, "old_output");
  call.collapse();
  return with_type(call, [&](auto zero) {
    using T = decltype(zero);
    require(!sigmas.is_none() && !advantages.is_none(), "sigmas and advantages are needed");
    const auto sigma = per_child<T>(sigmas, count, "sigmas");
    const auto advantage = per_child<T>(advantages, count, "advantages");
    const auto weight = per_child<T>(weights, count, "weights");
    check_weights(weight, count, weights, given_divisor);
    const ForwardArguments<T> args{sigma.data(), advantage.data(), pointer(weight, weights),
                                   static_cast<T>(beta), static_cast<T>(adv_max),
                                   static_cast<T>(kl_weight), static_cast<T>(minimum),
                                   given_divisor};
    Result<T> loss{std::initializer_list<int64_t>{}}, metrics{kForwardMetrics};
    Result<T> scales = with_scales ? Result<T>{count, kScales} : Result<T>();
    {
      const Released released(call.work());
      nft_loss(call.batch, args, loss.data, metrics.data, scales.data);
    }
    return py::make_tuple(loss.tensor, metrics.tensor, scales.tensor);
  });
}

// The strides that torch.empty_like gives: dense, dimensions in the order of the given strides.
void dense_like(const View& v, int64_t* strides) {
  int order[kMaxRank];  // innermost first
  for (int d = 0; d < v.rank; ++d) order[d] = v.rank - 1 - d;
  // Whether a must lie outside of b: 1, -1, or 0 if it may stay. An expanded dimension may.
  const auto outside_of = [&](int a, int b) {
    if (v.strides[a] == 0 || v.strides[b] == 0) return 0;
    if (v.strides[a] != v.strides[b]) return v.strides[a] > v.strides[b] ? 1 : -1;
    return v.shape[a] > v.shape[b] ? 1 : 0;
  };
  for (int i = 1; i < v.rank; ++i) {
    for (int at = i, other = i - 1; other >= 0; --other) {
      const int verdict = outside_of(order[other], order[at]);
      if (verdict < 0) break;
      if (verdict == 0) continue;
      std::swap(order[other], order[at]);
      at = other;
    }
  }
  int64_t step = 1;
  for (int i = 0; i < v.rank; ++i) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(v.shape[order[i]], 1);
  }
}

py::object op_gradient(py::handle upstream, py::handle scales, py::handle m, py::handle x,
                       py::handle y, py::handle coefficients, py::handle child_offsets,
                       py::handle ref, py::handle old, py::handle box, int threads) {
  Call call(m, x, box, threads);
  const View table_view = read_table(call, coefficients, child_offsets);
  const int64_t count = call.children();
  call.add(call.batch.y, y, count, "next_latents");
  call.add(call.batch.ref, ref, call.states(), "reference_output");
  call.add(call.batch.old, old, call.states(), "old_output");
  const View scale_view = read(scales, "scales"), upstream_view = read(upstream, "upstream");
  require(scale_view.is({count, kScales}), "scales: [children, 3]");
  require(upstream_view.rank == 0 || upstream_view.is({count}), "upstream: [] or [children]");
  int64_t strides[kMaxRank];
  dense_like(call.m_view, strides);
  Operand out;
  const py::object dm = call.add_result(out, call.m_view.dtype, call.states(), strides);
  const Operand outer = out;
  // So much gradient is out of the cache before anyone reads it.
  out.past_cache = call.elements(call.states()) >= kPastCacheElements;
  call.collapse();
  with_type(call, [&](auto zero) {
    using T = decltype(zero);
    const auto table = values<T>(table_view, "coefficients");
    auto factors = values<T>(scale_view, "scales");
    const auto u = values<T>(upstream_view, "upstream");
    for (size_t i = 0; i < factors.size(); ++i)
      factors[i] *= u[upstream_view.rank ? i / kScales : 0];
    const Released released(call.work());
    transition_gradient(call.batch, table.data(), factors.data(), out);
    if (!call.whole) {
      const Families each{call.states(), call.states(), nullptr};
      fill_outside<T>(each, call.dims, call.sizes, call.start, call.stop, outer, Operand(),
                      threads);
    }
  });
  return dm;
}

}  // namespace

void bind_ops(py::module_& m) {
  py::register_exception<Refused>(m, "Refused", PyExc_ValueError);
  m.def("sample_transition", &op_sample, "(next latents, log-probs)");
  m.def("transition_log_prob", &op_log_prob, "Log-probs.");
  m.def("policy_loss", &op_policy, "(loss, log-probs, metrics, scales or None)");
  m.def("nft_loss", &op_nft, "(loss, metrics, scales or None)");
  m.def("transition_gradient", &op_gradient, "The gradient with respect to the model output.");
  m.def("use_exchange", &use_exchange,
        "For tests: whether to read tensors through DLPack's C API where torch has it.");
}

}  // namespace dg
