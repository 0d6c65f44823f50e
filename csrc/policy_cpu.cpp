// The clipped policy-gradient loss: means over the latents, then scalar work for each child.
#include <cmath>

#include "ops_cpu.h"

namespace dg {
namespace {

constexpr double kLinkEpsilon = 1e-10;

// torch.maximum: NaN wins.
template <class T>
T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

template <class T>
struct Surrogate {
  T value = 0, slope = 0;  // slope: d value / d log rho

  // Adds u max(-A rho, -A clipped) for an advantage A of one sign.
  void add(T advantage, T u, T ratio, T clipped) {
    const T free = -advantage * ratio, bound = -advantage * clipped;
    value += u * maximum(free, bound);
    if (!(free < bound)) slope += u * free;  // NaN passes
  }
};

template <class T>
struct Link {
  T value, slope;

  Link(T e, T power) : value(e), slope(1) {
    if (power == 1) return;
    const T epsilon = static_cast<T>(kLinkEpsilon);
    value = (std::pow(e + epsilon, power) - std::pow(epsilon, power)) / power;
    slope = std::pow(e + epsilon, power - 1);
  }
};

}  // namespace

template <class T>
void policy_loss(const Batch& batch, const PolicyArguments<T>& args, T* loss, T* log_prob,
                 T* metrics, T* scales) {
  const Means<T> means = transition_means(batch, args.table);
  const bool normalises = batch.old && !args.penalises;
  const T n = static_cast<T>(batch.grid.elements);
  const auto weight_of = [&](int64_t c) { return args.weights ? args.weights[c] : T(1); };
  double total_weight = 0;
  for (int64_t c = 0; c < batch.families.children; ++c) total_weight += weight_of(c);
  const double divisor_exact = args.divisor > 0 ? args.divisor : total_weight;
  const T divisor = static_cast<T>(divisor_exact);
  const T low = static_cast<T>(1 - args.low), high = static_cast<T>(1 + args.high);
  double policy = 0, kl = 0, penalty = 0, measured[kPolicyMetrics] = {};

  for (int64_t state = 0; state < batch.families.states; ++state) {
    const int64_t last = batch.families.last(state);
    for (int64_t c = batch.families.first(state); c < last; ++c) {
      const T* row = args.table + c * kCoefficients;
      const T b = row[1], s = row[2], w = row[3], k = row[5], weight = weight_of(c);
      const Link<T> link(means.residual[c], args.power);
      const T lp = row[4] - w * link.value;
      T log_ratio = lp - (args.old_log_prob ? args.old_log_prob[c] : lp);
      if (normalises) log_ratio = (log_ratio + w * b * b * means.old_distance[state]) * s;
      const T ratio = std::exp(log_ratio);
      const T clipped = ratio < low ? low : ratio > high ? high : ratio;
      Surrogate<T> surrogate;
      for (int64_t r = 0; r < args.rewards; ++r) {
        const T* part = args.parts + 2 * (c * args.rewards + r);
        const T u = args.reward_weights ? args.reward_weights[r] : T(1);
        surrogate.add(part[0], u, ratio, clipped);
        surrogate.add(part[1], u, ratio, clipped);
      }
      const T kl_child = batch.ref ? weight * k * means.ref_distance[state] : T(0);
      const T old_child = weight * means.old_distance[state];
      policy += surrogate.value;
      kl += kl_child;
      penalty += old_child;
      log_prob[c] = lp;
      if (weight > 0) {
        const T deviation = ratio - 1;
        const T values[kPolicyMetrics] = {
            1, weight, surrogate.value, kl_child, lp, ratio, std::fabs(deviation),
            deviation * deviation, T(ratio < low), T(ratio > high), old_child};
        for (int i = 0; i < kPolicyMetrics; ++i) measured[i] += values[i];
      }
      if (!scales) continue;
      const T slope = surrogate.slope / divisor, q = normalises ? s : T(1);
      T* scale = scales + c * kScales;
      scale[0] = slope * q * w * link.slope * 2 * b / n;
      scale[1] = args.kl_weight * weight * k * 2 / (n * divisor);
      scale[2] = normalises       ? slope * s * w * b * b * 2 / n
                 : args.penalises ? args.old_penalty * weight * 2 / (n * divisor)
                                  : T(0);
    }
  }
  double total = policy;
  // A weight of 0 only measures: NaN stays out of the loss.
  if (args.kl_weight != 0) total += static_cast<double>(args.kl_weight) * kl;
  if (args.penalises && args.old_penalty != 0)
    total += static_cast<double>(args.old_penalty) * penalty;
  *loss = static_cast<T>(total / divisor_exact);
  for (int i = 0; i < kPolicyMetrics; ++i) metrics[i] = static_cast<T>(measured[i]);
}

template void policy_loss(const Batch&, const PolicyArguments<float>&, float*, float*, float*,
                          float*);
template void policy_loss(const Batch&, const PolicyArguments<double>&, double*, double*, double*,
                          double*);

}  // namespace dg
