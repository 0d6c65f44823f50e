// The five ops on the CPU: plain C++ over operands, no Python. T = float or double is what
// everything is computed in. The maths and the names are those of ops/reference.py; the tests
// compare the two.
#pragma once
#include <cstdint>
#include <vector>

#include "layout.h"

namespace dg {

constexpr int kCoefficients = 8;  // a, b, s, w, c, k, p, q
constexpr int kPolicyMetrics = 11;
constexpr int kForwardMetrics = 9;
constexpr int kScales = 3;

// What the latent-sized work of every op sees. Rows of m, x, ref and old are states; of y and noise
// children.
struct Batch {
  Families families;
  Grid grid;
  Operand m, x, y, ref, old, noise, index;
  int threads = 1;
};

// y = round(a x + b m + s eps) inside the box and log_prob [children] of it. eps comes from
// batch.noise or from keys [children][2]; children with s <= 0 take none.
template <class T>
void sample_transition(const Batch& batch, const T* table, const uint64_t* keys, T* log_prob);

template <class T>
void transition_log_prob(const Batch& batch, const T* table, T* log_prob);

// Means over the box: residual [children] of (y - (a x + b m))^2, and for each state that has
// children ref_distance and old_distance of (m - ref)^2 and (m - old)^2, 0 without such a tensor.
template <class T>
struct Means {
  std::vector<T> residual, ref_distance, old_distance;
};
template <class T>
Means<T> transition_means(const Batch& batch, const T* table);

template <class T>
struct PolicyArguments {
  const T *table, *parts, *old_log_prob, *weights, *reward_weights;  // null: on-policy, 1, 1
  int64_t rewards;                                                   // parts [children][R][2]
  double low, high;
  double divisor;   // 0: the sum of the weights
  T kl_weight, power;
  bool penalises;   // old enters the loss, not the ratio
  T old_penalty;
};
template <class T>
void policy_loss(const Batch& batch, const PolicyArguments<T>& args, T* loss, T* log_prob,
                 T* metrics, T* scales);

template <class T>
struct ForwardArguments {
  const T *sigmas, *advantages, *weights;  // null: 1
  T beta, adv_max, kl_weight, minimum;
  double divisor;  // 0: the sum of the weights
};
template <class T>
void nft_loss(const Batch& batch, const ForwardArguments<T>& args, T* loss, T* metrics, T* scales);

// gradient = sum_c f0_c (y_c - (a_c x + b_c m)) + (sum_c f1_c)(m - ref) + (sum_c f2_c)(m - old)
// inside the box, for factors [children][3]. A tensor whose factor is 0 is not read.
template <class T>
void transition_gradient(const Batch& batch, const T* table, const T* factors,
                         const Operand& gradient);

// Outside the box: values of `from` (null: zeros). Rows of `to` are children, of `from` their
// states.
template <class T>
void fill_outside(const Families& families, int dims, const int64_t* sizes, const int64_t* start,
                  const int64_t* stop, const Operand& to, const Operand& from, int threads);

}  // namespace dg
