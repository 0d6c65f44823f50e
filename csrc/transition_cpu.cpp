// Drawing transitions, their log-probs and the gradient. Compile with -ffp-contract=off.
#include "ops_cpu.h"

namespace dg {
namespace {

constexpr int64_t kGroup = 32;  // children that share one load of their state's m and x

template <class T>
struct Lanes {
  alignas(64) T of[kLanes] = {};
};

// The mean of a row from its chunk sums: added in double, in order, whoever computed them.
template <class T>
T mean(const T* chunks, const Grid& grid) {
  double sum = 0;
  for (int64_t i = 0; i < grid.chunks(); ++i) sum += static_cast<double>(chunks[i]);
  return static_cast<T>(sum / static_cast<double>(grid.elements));
}

template <class T>
T log_density(const T* row, T mean_square) {
  return row[4] - row[3] * mean_square;
}

// Calls body(state, chunk, first child, last child) for every chunk of up to kGroup children of
// every state that has any.
template <class Body>
void for_chunks(const Batch& batch, const Body& body) {
  const int64_t chunks = batch.grid.chunks();
  const int64_t elements = batch.families.children * batch.grid.elements;
  parallel(batch.families.states * chunks, elements, batch.threads, [&](int64_t task) {
    const int64_t state = task / chunks, chunk = task % chunks;
    const int64_t last = batch.families.last(state);
    for (int64_t c = batch.families.first(state); c < last; c += kGroup)
      body(state, chunk, c, std::min(c + kGroup, last));
  });
}

// Calls body(first element, count) for the tiles of a chunk.
template <class Body>
void for_tiles(const Grid& grid, int64_t chunk, const Body& body) {
  const int64_t stop = std::min((chunk + 1) * kChunk, grid.elements);
  for (int64_t i = chunk * kChunk; i < stop; i += kTile) body(i, std::min(kTile, stop - i));
}

// a x + b m on one tile. Siblings mostly share a and b: computed anew only when they change.
template <class T>
class Center {
 public:
  Center(const T* x, const T* m, int64_t n) : x_(x), m_(m), n_(n) {}

  const T* of(const T* row) {
    if (!row_ || row[0] != row_[0] || row[1] != row_[1]) affine(tile_, x_, m_, row[0], row[1], n_);
    row_ = row;
    return tile_;
  }

 private:
  alignas(64) T tile_[kTile];
  const T *x_, *m_, *row_ = nullptr;
  int64_t n_;
};

}  // namespace

template <class T>
Means<T> transition_means(const Batch& batch, const T* table) {
  const int64_t states = batch.families.states, children = batch.families.children;
  const int64_t chunks = batch.grid.chunks();
  const int64_t ref_rows = children, old_rows = children + (batch.ref ? states : 0);
  std::vector<T> sums((old_rows + (batch.old ? states : 0)) * chunks);
  for_chunks(batch, [&](int64_t state, int64_t chunk, int64_t from, int64_t to) {
    alignas(64) T m_tile[kTile], x_tile[kTile], other[kTile];
    Lanes<T> lanes[kGroup], ref, old;
    const bool leads = from == batch.families.first(state);
    for_tiles(batch.grid, chunk, [&](int64_t first, int64_t n) {
      const T* m = load(batch.m, batch.grid, state, first, n, m_tile);
      const T* x = load(batch.x, batch.grid, state, first, n, x_tile);
      Center<T> center(x, m, n);
      for (int64_t c = from; c < to; ++c) {
        const T* y = load(batch.y, batch.grid, c, first, n, other);
        distance(lanes[c - from].of, y, center.of(table + c * kCoefficients), n);
      }
      if (leads && batch.ref)
        distance(ref.of, m, load(batch.ref, batch.grid, state, first, n, other), n);
      if (leads && batch.old)
        distance(old.of, m, load(batch.old, batch.grid, state, first, n, other), n);
    });
    for (int64_t c = from; c < to; ++c) sums[c * chunks + chunk] = halve(lanes[c - from].of);
    if (leads && batch.ref) sums[(ref_rows + state) * chunks + chunk] = halve(ref.of);
    if (leads && batch.old) sums[(old_rows + state) * chunks + chunk] = halve(old.of);
  });
  const auto means = [&](int64_t first, int64_t count) {
    std::vector<T> result(count);
    for (int64_t i = 0; i < count; ++i) result[i] = mean(&sums[(first + i) * chunks], batch.grid);
    return result;
  };
  return {means(0, children), batch.ref ? means(ref_rows, states) : std::vector<T>(states),
          batch.old ? means(old_rows, states) : std::vector<T>(states)};
}

template <class T>
void transition_log_prob(const Batch& batch, const T* table, T* log_prob) {
  const Means<T> means = transition_means(batch, table);
  for (int64_t c = 0; c < batch.families.children; ++c)
    log_prob[c] = log_density(table + c * kCoefficients, means.residual[c]);
}

template <class T>
void sample_transition(const Batch& batch, const T* table, const uint64_t* keys, T* log_prob) {
  const int64_t chunks = batch.grid.chunks();
  std::vector<T> sums(batch.families.children * chunks);
  for_chunks(batch, [&](int64_t state, int64_t chunk, int64_t from, int64_t to) {
    alignas(64) T m_tile[kTile], x_tile[kTile], y_tile[kTile], eps_tile[kTile];
    alignas(64) float block[kTile + 8];
    Lanes<T> lanes[kGroup];
    for_tiles(batch.grid, chunk, [&](int64_t first, int64_t n) {
      const T* m = load(batch.m, batch.grid, state, first, n, m_tile);
      const T* x = load(batch.x, batch.grid, state, first, n, x_tile);
      Center<T> center(x, m, n);
      for (int64_t c = from; c < to; ++c) {
        const T* row = table + c * kCoefficients;
        const T* mean = center.of(row);
        if (row[2] > 0) {
          const T* eps =
              batch.noise ? load(batch.noise, batch.grid, c, first, n, eps_tile)
                          : draw(keys + 2 * c, batch.index, batch.grid, first, n, eps_tile, block);
          T* drawn = target(batch.y, batch.grid, c, first, y_tile);
          add_scaled(drawn, mean, eps, row[2], n);
          store(batch.y, batch.grid, c, first, n, drawn);
        } else {
          store(batch.y, batch.grid, c, first, n, mean);
        }
        // The log-prob is that of the value as stored.
        distance(lanes[c - from].of, load(batch.y, batch.grid, c, first, n, y_tile), mean, n);
      }
    });
    for (int64_t c = from; c < to; ++c) sums[c * chunks + chunk] = halve(lanes[c - from].of);
  });
  for (int64_t c = 0; c < batch.families.children; ++c)
    log_prob[c] = log_density(table + c * kCoefficients, mean(&sums[c * chunks], batch.grid));
}

template <class T>
void transition_gradient(const Batch& batch, const T* table, const T* factors,
                         const Operand& out) {
  const Grid& grid = batch.grid;
  const int64_t chunks = grid.chunks();
  const int64_t elements = std::max(batch.families.states, batch.families.children) * grid.elements;
  parallel(batch.families.states * chunks, elements, batch.threads, [&](int64_t task) {
    const int64_t state = task / chunks;
    const int64_t from = batch.families.first(state), to = batch.families.last(state);
    T of_ref = 0, of_old = 0;
    for (int64_t c = from; c < to; ++c) of_ref += factors[3 * c + 1], of_old += factors[3 * c + 2];
    alignas(64) T m_tile[kTile], x_tile[kTile], other[kTile], sum_tile[kTile];
    for_tiles(grid, task % chunks, [&](int64_t first, int64_t n) {
      const T* m = load(batch.m, grid, state, first, n, m_tile);
      const T* x = load(batch.x, grid, state, first, n, x_tile);
      T* sum = target(out, grid, state, first, sum_tile);
      Center<T> center(x, m, n);
      bool empty = true;
      for (int64_t c = from; c < to; ++c) {
        if (factors[3 * c] == 0) continue;
        const T* y = load(batch.y, grid, c, first, n, other);
        difference(sum, y, center.of(table + c * kCoefficients), factors[3 * c], empty, n);
        empty = false;
      }
      if (batch.ref && of_ref != 0) {
        difference(sum, m, load(batch.ref, grid, state, first, n, other), of_ref, empty, n);
        empty = false;
      }
      if (batch.old && of_old != 0) {
        difference(sum, m, load(batch.old, grid, state, first, n, other), of_old, empty, n);
        empty = false;
      }
      if (empty) std::fill_n(sum, n, T(0));
      store(out, grid, state, first, n, sum);
    });
    if (out.past_cache) finish_past_cache();
  });
}

template <class T>
void fill_outside(const Families& families, int dims, const int64_t* sizes, const int64_t* start,
                  const int64_t* stop, const Operand& to, const Operand& from, int threads) {
  outside(dims, sizes, start, stop, [&](const int64_t* low, const int64_t* high) {
    Operand out = to, in = from;
    std::vector<Operand*> operands{&out};
    if (from) operands.push_back(&in);
    const Grid grid(dims, low, high, operands);
    const int64_t chunks = grid.chunks();
    const int64_t elements = families.children * grid.elements;
    parallel(families.states * chunks, elements, threads, [&](int64_t task) {
      alignas(64) T tile[kTile] = {};
      const int64_t state = task / chunks;
      for_tiles(grid, task % chunks, [&](int64_t first, int64_t n) {
        const T* values = from ? load(in, grid, state, first, n, tile) : tile;
        for (int64_t c = families.first(state); c < families.last(state); ++c)
          store(out, grid, c, first, n, values);
      });
    });
  });
}

#define DG_INSTANCE(T)                                                                          \
  template Means<T> transition_means(const Batch&, const T*);                                   \
  template void transition_log_prob(const Batch&, const T*, T*);                                \
  template void sample_transition(const Batch&, const T*, const uint64_t*, T*);                 \
  template void transition_gradient(const Batch&, const T*, const T*, const Operand&);          \
  template void fill_outside<T>(const Families&, int, const int64_t*, const int64_t*,           \
                                const int64_t*, const Operand&, const Operand&, int);
DG_INSTANCE(float)
DG_INSTANCE(double)
#undef DG_INSTANCE

}  // namespace dg
