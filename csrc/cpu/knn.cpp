// Similarities of two groups of rows at a time, each pair of groups once: a similarity is offered to both of its rows.
// A candidate is looked at only if it reaches the worst neighbour that a row holds, which a vector comparison tells for
// many at once. The neighbours of a row are the first ones by similarity, then index, whatever the order of the groups.
//
// Rows are held in panels, [dim, rows of a panel]: the left and the right factor of a product are both read in order.
#include "../knn.h"

#include <omp.h>

#include "interruption.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr double kGrain = 1e6;         // operations a thread
constexpr int kPanelVectors = 3;       // of rows
constexpr int64_t kChunk = 128;        // columns at a time: so much of two panels stays in the first-level cache
constexpr int64_t kGroupRows = 192;    // so much of two groups, and their similarities, in the second-level cache
constexpr int64_t kGroupsAThread = 4;  // at least, where there are enough rows

template <typename T>
constexpr int kPanel = kPanelVectors * kLanes<T>;
// Rows of a tile: with the vectors of a panel they fill the registers.
template <typename T>
constexpr int kTall = kVectorBytes == 64   ? 8
                      : kPanel<T> % 4 == 0 ? 4
                                           : 3;

template <typename T>
struct Problem {
  const KnnArguments& arguments;
  int64_t group;  // rows, whole panels
  T* unit;        // [panels, dim, kPanel], zero padded
  bool* present;  // [padded rows]: not all zero
  T* worst;       // [padded rows]: similarity of the last neighbour held, infinite for rows that search none
};

// One row's k best, best first; lower index first among equals.
template <typename T>
inline void offer(const Problem<T>& p, int64_t row, int64_t candidate, T value) {
  const int64_t k = p.arguments.k;
  T* const best = static_cast<T*>(p.arguments.similarity) + row * k;
  int64_t* const index = p.arguments.index + row * k;
  const auto behind = [&](int64_t at) { return best[at] < value || (best[at] == value && index[at] > candidate); };
  if (!p.present[candidate] || !behind(k - 1)) return;
  int64_t at = k - 1;
  for (; at > 0 && behind(at - 1); --at) {
    best[at] = best[at - 1];
    index[at] = index[at - 1];
  }
  best[at] = value;
  index[at] = candidate;
  p.worst[row] = best[k - 1];
}

// s [group, group]: rows of group b against those of group a.
template <typename T>
void similarities(const Problem<T>& p, int64_t a, int64_t b, T* s) {
  const int64_t dim = p.arguments.dim, panels = p.group / kPanel<T>, size = dim * kPanel<T>;
  for (int64_t k = 0; k < dim; k += kChunk) {
    const int64_t depth = dim - k < kChunk ? dim - k : kChunk;
    for (int64_t i = 0; i < panels; ++i) {
      for (int64_t j = 0; j < panels; ++j) {
        const T* const columns = p.unit + (a * panels + i) * size + k * kPanel<T>;
        const T* const rows = p.unit + (b * panels + j) * size + k * kPanel<T>;
        T* const out = s + j * kPanel<T> * p.group + i * kPanel<T>;
        for (int row = 0; row < kPanel<T>; row += kTall<T>) {
          if (k == 0) {
            tile<kTall<T>, kPanelVectors, Into::kProduct>(rows + row, 1, kPanel<T>, columns, kPanel<T>,
                                                          out + row * p.group, p.group, depth);
          } else {
            tile<kTall<T>, kPanelVectors, Into::kSum>(rows + row, 1, kPanel<T>, columns, kPanel<T>, out + row * p.group,
                                                      p.group, depth);
          }
        }
      }
    }
  }
}

// Offers the similarities of two groups to the rows of both, those of one group to each row once.
template <bool kSame, typename T>
void select(const Problem<T>& p, int64_t a, int64_t b, const T* s) {
  const int64_t first_row = b * p.group, first_column = a * p.group;
  for (int64_t j = 0; j < p.group; ++j, s += p.group) {
    const int64_t row = first_row + j;
    for (int64_t i = 0; i < p.group; i += kLanes<T>) {
      const Vector<T> value = load(s + i);
      auto reaches = value >= broadcast(p.worst[row]);
      if (!kSame) reaches |= value >= load(p.worst + first_column + i);
      for (uint32_t lanes = lanes_of(reaches); lanes != 0; lanes &= lanes - 1) {
        const int64_t lane = i + __builtin_ctz(lanes), column = first_column + lane;
        if (s[lane] >= p.worst[row]) offer(p, row, column, s[lane]);
        if (!kSame && s[lane] >= p.worst[column]) offer(p, column, row, s[lane]);
      }
    }
  }
}

template <typename T, typename S>
void load_panel(const Problem<T>& p, int64_t panel, T* row) {
  const KnnArguments& a = p.arguments;
  T* const out = p.unit + panel * a.dim * kPanel<T>;
  for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
    const int64_t r = panel * kPanel<T> + lane;
    p.present[r] = r < a.num_rows && normalize_row(static_cast<const S*>(a.x) + r * a.dim, a.dim, a.dim, row);
    p.worst[r] = p.present[r] ? T(-1e30) : std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < a.dim; ++k) out[k * kPanel<T> + lane] = p.present[r] ? row[k] : T(0);
    for (int64_t place = r * a.k; r < a.num_rows && place < (r + 1) * a.k; ++place) {
      static_cast<T*>(a.similarity)[place] = T(-1e30);
      a.index[place] = -1;
    }
  }
}

// The pairs of different groups in the order of a tournament: those near each other share no group. Group `last` stands
// still while the others go around; of an odd number it stands for none.
struct Tournament {
  int64_t last;  // odd

  explicit Tournament(int64_t groups) : last(groups - 1 + groups % 2) {}
  int64_t pairs() const { return last * (last + 1) / 2; }
  void groups_of(int64_t pair, int64_t& a, int64_t& b) const {
    const int64_t round = pair / ((last + 1) / 2), place = pair % ((last + 1) / 2);
    a = place == 0 ? last : (round + place) % last;
    b = (round - place + last) % last;
  }
};

template <typename T, typename S>
void run(const KnnArguments& a, Interruption& interruption) {
  const int threads = useful_threads(a.num_threads, double(a.num_rows) * double(a.num_rows) * double(a.dim), kGrain);
  const int64_t panels = (a.num_rows + kPanel<T> - 1) / kPanel<T>;
  const int64_t most = kGroupRows * int64_t(sizeof(float)) / (kPanel<T> * int64_t(sizeof(T)));
  const int64_t wanted = panels / (kGroupsAThread * threads);
  const int64_t group_panels = wanted > most ? most : wanted < 1 ? 1 : wanted;
  const int64_t groups = (panels + group_panels - 1) / group_panels, group = group_panels * kPanel<T>;
  const Tournament tournament(groups);

  Buffer<T> unit(groups * group * a.dim), worst(groups * group), scratch(threads * (group * group + a.dim));
  Buffer<bool> present(groups * group);
  Buffer<omp_lock_t> locks(groups);
  for (int64_t one = 0; one < groups; ++one) omp_init_lock(locks + one);
  const Problem<T> p{a, group, unit, present, worst};
#pragma omp parallel num_threads(threads)
  {
    T* const s = scratch + omp_get_thread_num() * (group * group + a.dim);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < groups * group_panels; ++panel) {
      if (!interruption.after(a.dim * kPanel<T>)) load_panel<T, S>(p, panel, s + group * group);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < groups + tournament.pairs(); ++pair) {
      int64_t first = pair, second = pair;
      if (pair >= groups) tournament.groups_of(pair - groups, first, second);
      if (first >= groups || interruption.after(group * group * a.dim)) continue;
      similarities(p, first, second, s);
      // In the order of the groups, so that no two threads wait for each other.
      omp_set_lock(locks + (first < second ? first : second));
      if (first == second) {
        select<true>(p, first, second, s);
      } else {
        omp_set_lock(locks + (first < second ? second : first));
        select<false>(p, first, second, s);
        omp_unset_lock(locks + (first < second ? second : first));
      }
      omp_unset_lock(locks + (first < second ? first : second));
    }
#pragma omp for schedule(static)
    for (int64_t place = 0; place < a.num_rows * a.k; ++place) {
      if (a.index[place] < 0) static_cast<T*>(a.similarity)[place] = T(0);
    }
  }
  for (int64_t one = 0; one < groups; ++one) omp_destroy_lock(locks + one);
}

}  // namespace

void knn(const KnnArguments& a, Interruption& interruption) { HELLM_BY_DTYPE(run, a, interruption) }

}  // namespace hellm::cpu::HELLM_ISA
