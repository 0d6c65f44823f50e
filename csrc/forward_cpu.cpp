// DiffusionNFT's two-branch loss (arXiv 2509.16117) with its adaptive weight.
#include <cmath>

#include "ops_cpu.h"

namespace dg {
namespace {

constexpr int kSums = 5;  // |e+|, e+^2, |e-|, e-^2, (v - v_ref)^2

// [states][kSums], means over the box.
template <class T>
std::vector<T> branch_means(const Batch& batch, const ForwardArguments<T>& args) {
  const Grid& grid = batch.grid;
  const int64_t chunks = grid.chunks(), states = batch.families.states;
  std::vector<T> sums(states * chunks * kSums);
  parallel(states * chunks, states * grid.elements, batch.threads, [&](int64_t task) {
    const int64_t state = task / chunks, begin = task % chunks * kChunk;
    const int64_t stop = std::min(begin + kChunk, grid.elements);
    const T sigma = args.sigmas[state];
    const T plus = sigma * (1 - args.beta), minus = sigma * (1 + args.beta);
    alignas(64) T m_tile[kTile], x_tile[kTile], y_tile[kTile], center[kTile], other[kTile];
    alignas(64) T lanes[kSums * kLanes] = {};
    for (int64_t i = begin; i < stop; i += kTile) {
      const int64_t n = std::min(kTile, stop - i);
      const T* m = load(batch.m, grid, state, i, n, m_tile);
      const T* x = load(batch.x, grid, state, i, n, x_tile);
      const T* y = load(batch.y, grid, state, i, n, y_tile);
      affine(center, x, m, T(1), -sigma, n);
      branches(lanes, center, y, m, load(batch.old, grid, state, i, n, other), plus, minus, n);
      if (batch.ref)
        distance(lanes + 4 * kLanes, m, load(batch.ref, grid, state, i, n, other), n);
    }
    for (int k = 0; k < kSums; ++k) sums[task * kSums + k] = halve(lanes + k * kLanes);
  });
  std::vector<T> means(states * kSums);
  for (int64_t i = 0; i < states * kSums; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum += sums[(i / kSums * chunks + chunk) * kSums + i % kSums];
    means[i] = static_cast<T>(sum / static_cast<double>(grid.elements));
  }
  return means;
}

template <class T>
T at_least(T value, T minimum) {
  return value < minimum ? minimum : value;  // NaN stays
}

}  // namespace

template <class T>
void nft_loss(const Batch& batch, const ForwardArguments<T>& args, T* loss, T* metrics, T* scales) {
  const std::vector<T> means = branch_means(batch, args);
  const int64_t states = batch.families.states;
  const T n = static_cast<T>(batch.grid.elements);
  const auto weight_of = [&](int64_t i) { return args.weights ? args.weights[i] : T(1); };
  double total_weight = 0;
  for (int64_t i = 0; i < states; ++i) total_weight += weight_of(i);
  const double divisor = args.divisor > 0 ? args.divisor : total_weight;
  double policy = 0, kl = 0, measured[kForwardMetrics] = {};

  for (int64_t i = 0; i < states; ++i) {
    const T* mean = &means[i * kSums];
    const T sigma = args.sigmas[i], weight = weight_of(i);
    const T plus_size = at_least(mean[0], args.minimum);
    const T minus_size = at_least(mean[2], args.minimum);
    const T plus = mean[1] / plus_size, minus = mean[3] / minus_size;
    T p = args.advantages[i] / (2 * args.adv_max) + T(0.5);
    p = p < 0 ? T(0) : p > 1 ? T(1) : p;
    const T child = weight * (args.adv_max * (p * plus + (1 - p) * minus) / args.beta);
    const T kl_child = batch.ref ? weight * mean[4] : T(0);
    policy += child;
    kl += kl_child;
    if (weight > 0) {
      const T values[kForwardMetrics] = {1,     weight,    child,      kl_child, plus,
                                         minus, plus_size, minus_size, p};
      for (int k = 0; k < kForwardMetrics; ++k) measured[k] += values[k];
    }
    if (!scales) continue;
    const T share = static_cast<T>(2 / (static_cast<double>(n) * divisor));
    const T h = weight * args.adv_max * share * sigma;  // the loss's 1 / beta meets d e's beta
    const T g_plus = -h * p / plus_size, g_minus = h * (1 - p) / minus_size;
    T* scale = scales + i * kScales;
    scale[0] = -(g_plus + g_minus);
    scale[1] = args.kl_weight * weight * share;
    scale[2] = sigma * (g_plus * (1 - args.beta) + g_minus * (1 + args.beta));
  }
  // A weight of 0 only measures: NaN stays out of the loss.
  const double total = args.kl_weight != 0 ? policy + static_cast<double>(args.kl_weight) * kl
                                           : policy;
  *loss = static_cast<T>(total / divisor);
  for (int k = 0; k < kForwardMetrics; ++k) metrics[k] = static_cast<T>(measured[k]);
}

template void nft_loss(const Batch&, const ForwardArguments<float>&, float*, float*, float*);
template void nft_loss(const Batch&, const ForwardArguments<double>&, double*, double*, double*);

}  // namespace dg
