// The CPU's kernels: moments, shrink and fused optimizer steps, each one pass over memory, all layers in one call.
//
// To a penalty a layer is one unit, or each of its w[i] is one: sums, gains and thresholds are those of units. Layers are
// cut into blocks, threads take blocks, and a block is worked on row by row. A row fits the first-level cache, so what is
// done to it one loop after another reads and writes memory once. Short units share a row, long ones have several, and
// very long ones several blocks. Sums are in double, block by block in a fixed order: they depend neither on the number
// of threads nor on who asks, so a fused step leaves the very sums that measuring its weights would find.
//
// Loops are written for the compiler to vectorise. Nothing here allocates or throws; compiled.py owns all memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int ROW = 1024;
constexpr int64_t BLOCK = 16 * ROW;  // as in compiled.py
// How far ahead of a row memory is asked for: hardware keeps the many streams of an optimizer busy, but not a single one.
constexpr int AHEAD = ROW;
constexpr int CACHE_LINE = 64;

struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// --- a row as floats -------------------------------------------------------------------------------------------------

// A float row is worked on in place, one of bfloat16 in a copy.
inline float* open(float* row, float*, int) { return row; }
inline void close(float*, const float*, int) {}

inline float* open(const bfloat16* row, float* copy, int n) {
  for (int i = 0; i < n; i++) copy[i] = float_of(uint32_t{row[i].bits} << 16);
  return copy;
}

// Rounds to nearest, ties to even, as torch's conversion does.
inline void close(bfloat16* row, const float* copy, int n) {
  for (int i = 0; i < n; i++) {
    const uint32_t bits = bits_of(copy[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    row[i].bits = static_cast<uint16_t>(copy[i] != copy[i] ? (bits >> 16) | 0x40 : rounded);
  }
}

template <class T>
inline void prefetch(const T* row, int n) {
  constexpr int STEP = CACHE_LINE / sizeof(T);
  for (int i = 0; i < n; i += STEP) __builtin_prefetch(row + AHEAD + i);
}

// --- what is done to a row -------------------------------------------------------------------------------------------

struct Sums {
  double m = 0, q = 0;  // of m = |w| and m^2
};

// Not inlined, so that every caller gets the same instructions and the same bits.
__attribute__((noinline)) void add_up(const float* w, int n, Sums& sums) {
  double m = 0, q = 0;
#pragma omp simd reduction(+ : m, q)
  for (int i = 0; i < n; i++) {
    const double x = std::fabs(w[i]);
    m += x;
    q += x * x;
  }
  sums.m += m;
  sums.q += q;
}

inline bool changes(float gain, float threshold) { return gain != 1.0f || threshold != 0.0f; }

// The threshold spares weights from the cutoff on. A NaN passes, and so does an infinity.
inline void shrink(float* w, int n, float gain, float threshold, float cutoff = INFINITY) {
  if (!changes(gain, threshold)) return;
  for (int i = 0; i < n; i++) {
    const float above = w[i] < -threshold ? -threshold : w[i];
    const float clamped = above > threshold ? threshold : above;
    w[i] = (w[i] - (std::fabs(w[i]) >= cutoff ? 0 : clamped)) * gain;
  }
}

// Bijection of 32-bit integers whose output looks random (Wellons' lowbias32).
inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The same of 64-bit integers (Steele, Lea & Flood's splitmix64).
inline uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Rounding {
  bool stochastic;
  uint64_t seed;

  // Key of a row's random bits. Seeds count steps and starts tell rows apart: scrambled one after the other, since a
  // row would meet its neighbour's bits in the next step if they were added up.
  uint32_t key(int64_t layer, int64_t start) const {
    const uint64_t of_layer = scramble(scramble(seed) + static_cast<uint64_t>(layer));
    return static_cast<uint32_t>(scramble(of_layer + static_cast<uint64_t>(start)));
  }
};

inline void round_row(const float*, float*, int, const Rounding&, uint32_t) {}

// Brings floats onto bfloat16's grid, to finite values where they were finite before.
inline void round_row(const bfloat16* row, float* w, int n, const Rounding& rounding, uint32_t key) {
  constexpr uint32_t INFINITE = 0x7f800000, LARGEST = 0x7f7f0000, SIGN = 0x80000000;
  uint32_t noise[ROW];
  for (int i = 0; rounding.stochastic && i < ROW / 2; i++) {
    const uint32_t word = scramble(key + 0x9e3779b9u * static_cast<uint32_t>(i + 1));
    noise[i] = word & 0xffff;
    noise[i + ROW / 2] = word >> 16;
  }
  for (int i = 0; i < n; i++) {
    const uint32_t before = uint32_t{row[i].bits} << 16, bits = bits_of(w[i]);
    const uint32_t add = rounding.stochastic ? noise[i] : 0x7fff + ((bits >> 16) & 1);
    const uint32_t rounded = std::min(((bits & ~SIGN) + add) & 0xffff0000u, LARGEST) | (bits & SIGN);
    w[i] = float_of((before & INFINITE) == INFINITE ? before : rounded);
  }
}

struct AdamW {
  static constexpr int COEFFICIENTS = 5, STREAMS = 4;
  float sign, rate1, beta2, rate2, eps;

  void operator()(float* const* rows, int n, const float* c) const {
    float *__restrict p = rows[0], *__restrict m = rows[2], *__restrict v = rows[3];
    const float* __restrict g = rows[1];
    const float decay = c[2], step = c[3], root = c[4];
    for (int i = 0; i < n; i++) {
      const float gradient = sign * g[i];
      const float mean = m[i] + (gradient - m[i]) * rate1;
      const float square = beta2 * v[i] + rate2 * gradient * gradient;
      p[i] = p[i] * decay - step * mean / (std::sqrt(square) * root + eps);
      m[i] = mean;
      v[i] = square;
    }
  }
};

struct SGD {
  static constexpr int COEFFICIENTS = 3, STREAMS = 2;
  float sign, weight_decay;

  void operator()(float* const* rows, int n, const float* c) const {
    float* __restrict p = rows[0];
    const float* __restrict g = rows[1];
    const float lr = c[2];
    for (int i = 0; i < n; i++) p[i] -= lr * (sign * g[i] + weight_decay * p[i]);
  }
};

struct MomentumSGD {
  static constexpr int COEFFICIENTS = 3, STREAMS = 3;
  float sign, weight_decay, momentum, fresh;
  bool nesterov;

  void operator()(float* const* rows, int n, const float* c) const {
    float *__restrict p = rows[0], *__restrict b = rows[2];
    const float* __restrict g = rows[1];
    const float lr = c[2];
    for (int i = 0; i < n; i++) {
      const float gradient = sign * g[i] + weight_decay * p[i];
      const float buffer = momentum * b[i] + fresh * gradient;
      p[i] -= lr * (nesterov ? gradient + momentum * buffer : buffer);
      b[i] = buffer;
    }
  }
};

// --- all rows of all layers ------------------------------------------------------------------------------------------

}  // namespace

extern "C" struct Layers {  // as in compiled.py
  int64_t count, blocks, threads, narrow;
  const int64_t* addresses;  // stream by stream
  const int64_t* sizes;
  const int64_t* lengths;     // weights of one unit of every layer, not 0
  const int64_t* first;       // block of every layer
  const int64_t* first_unit;  // of every layer
  Sums* partial;              // of every block
  Sums* sums;                 // of every unit
};

namespace {

// How a layer with units of some length is cut: into groups of whole units, a group into one block or, where it is a
// single unit that does not fit one, into several.
struct Cut {
  int64_t together, group, blocks;  // weights of the units that share a row, weights of a group, blocks of a group

  explicit Cut(int64_t length)  // as in compiled.py
      : together(std::max<int64_t>(1, ROW / length) * length),
        group(std::max<int64_t>(1, BLOCK / together) * together),
        blocks((group + BLOCK - 1) / BLOCK) {}
};

// At most ROW weights of a layer: some whole units, or a part of one.
struct Row {
  int64_t layer, start, unit;  // the first of its units
  int n, length;               // weights, and those of each of its units
  Sums* sums;                  // of its first unit
};

// Calls work(row) for every row.
template <class Work>
void for_rows(const Layers& layers, const Work& work) {
#pragma omp parallel for num_threads(static_cast<int>(layers.threads)) schedule(static)
  for (int64_t block = 0; block < layers.blocks; block++) {
    const int64_t layer = std::upper_bound(layers.first, layers.first + layers.count, block) - layers.first - 1;
    const int64_t length = layers.lengths[layer], number = block - layers.first[layer];
    const Cut cut(length);
    const int64_t group = number / cut.blocks * cut.group;
    const int64_t begin = group + number % cut.blocks * BLOCK;
    const int64_t end = std::min({begin + BLOCK, group + cut.group, layers.sizes[layer]});
    for (int64_t units = begin; units < end; units += cut.together)
      for (int64_t start = units, stop = std::min(units + cut.together, end); start < stop; start += ROW) {
        const int64_t n = std::min<int64_t>(ROW, stop - start), unit = layers.first_unit[layer] + start / length;
        Sums* sums = cut.blocks > 1 ? layers.partial + block : layers.sums + unit;
        work(Row{layer, start, unit, static_cast<int>(n), static_cast<int>(std::min(n, length)), sums});
      }
  }
}

template <class T>
inline T* weights_of(const Layers& layers, int stream, const Row& row) {
  return reinterpret_cast<T*>(layers.addresses[stream * layers.count + row.layer]) + row.start;
}

inline void add_up(const float* w, const Row& row) {
  Sums* sums = row.sums;
  for (int i = 0; i < row.n; i += row.length) add_up(w + i, row.length, *sums++);
}

// Adds up the blocks of the units that are cut.
void finish(const Layers& layers) {
  for (int64_t layer = 0; layer < layers.count; layer++) {
    const int64_t blocks = Cut(layers.lengths[layer]).blocks, units = layers.sizes[layer] / layers.lengths[layer];
    for (int64_t block = 0; blocks > 1 && block < units * blocks; block++) {
      const Sums& part = layers.partial[layers.first[layer] + block];
      Sums& sums = layers.sums[layers.first_unit[layer] + block / blocks];
      sums.m += part.m;
      sums.q += part.q;
    }
  }
}

// With thresholds, those of the units, m is what they leave of |w|, which is all of it from the cutoff on. A NaN stays one.
template <class T>
void sum_all(const Layers& layers, const float* thresholds, float cutoff) {
  for_rows(layers, [&](const Row& row) {
    T* weights = weights_of<T>(layers, 0, row);
    float copy[ROW], left[ROW];
    prefetch(weights, row.n);
    const float* w = open(weights, copy, row.n);
    if (thresholds == nullptr) return add_up(w, row);
    for (int i = 0; i < row.n; i += row.length) {
      const float threshold = thresholds[row.unit + i / row.length];
      for (int j = i; j < i + row.length; j++) {
        const float m = std::fabs(w[j]), above = m - threshold;
        left[j] = m >= cutoff ? m : above < 0 ? 0 : above;
      }
    }
    add_up(left, row);
  });
  finish(layers);
}

// Gains and thresholds are those of the units.
template <class T>
void shrink_all(const Layers& layers, const float* gains, const float* thresholds, float cutoff,
                const Rounding& rounding) {
  for_rows(layers, [&](const Row& row) {
    const float *gain = gains + row.unit, *threshold = thresholds + row.unit;
    const int units = row.n / row.length;
    bool any = false;
    for (int unit = 0; unit < units; unit++) any |= changes(gain[unit], threshold[unit]);
    if (!any) return;
    T* weights = weights_of<T>(layers, 0, row);
    float copy[ROW];
    prefetch(weights, row.n);
    float* w = open(weights, copy, row.n);
    for (int unit = 0; unit < units; unit++)
      shrink(w + unit * row.length, row.length, gain[unit], threshold[unit], cutoff);
    round_row(weights, w, row.n, rounding, rounding.key(row.layer, row.start));
    close(weights, w, row.n);
  });
}

// A layer is one unit here.
template <class T, class Update>
void update_all(const Layers& layers, const float* coefficients, const Update& update, const Rounding& rounding) {
  for_rows(layers, [&](const Row& row) {
    const float* c = coefficients + Update::COEFFICIENTS * row.layer;
    T* streams[Update::STREAMS];
    float copies[Update::STREAMS][ROW];
    float* opened[Update::STREAMS];
    for (int s = 0; s < Update::STREAMS; s++) {
      streams[s] = weights_of<T>(layers, s, row);
      opened[s] = open(streams[s], copies[s], row.n);
    }
    prefetch(streams[0], row.n);
    if (changes(c[0], c[1])) {
      shrink(opened[0], row.n, c[0], c[1]);
      round_row(streams[0], opened[0], row.n, rounding, rounding.key(row.layer, row.start));
    }
    update(opened, row.n, c);
    for (int s = 0; s < Update::STREAMS; s++)
      if (s != 1) close(streams[s], opened[s], row.n);  // all but the gradient
    add_up(open(streams[0], copies[0], row.n), row);
  });
  finish(layers);
}

template <class Update>
void update_all(const Layers& layers, const float* coefficients, const Update& update, const Rounding& rounding) {
  layers.narrow ? update_all<bfloat16>(layers, coefficients, update, rounding)
                : update_all<float>(layers, coefficients, update, rounding);
}

}  // namespace

// --- the library's functions -----------------------------------------------------------------------------------------

extern "C" {

void wcr_sums(const Layers* layers, const float* thresholds, float cutoff) {
  layers->narrow ? sum_all<bfloat16>(*layers, thresholds, cutoff) : sum_all<float>(*layers, thresholds, cutoff);
}

void wcr_shrink(const Layers* layers, int stochastic, uint64_t seed, const float* gains, const float* thresholds,
                float cutoff) {
  const Rounding rounding{stochastic != 0, seed};
  layers->narrow ? shrink_all<bfloat16>(*layers, gains, thresholds, cutoff, rounding)
                 : shrink_all<float>(*layers, gains, thresholds, cutoff, rounding);
}

void wcr_adamw(const Layers* layers, int stochastic, uint64_t seed, const float* coefficients, const float* constants) {
  const float* c = constants;
  update_all(*layers, coefficients, AdamW{c[0], c[1], c[2], c[3], c[4]}, Rounding{stochastic != 0, seed});
}

void wcr_sgd(const Layers* layers, int stochastic, uint64_t seed, const float* coefficients, const float* constants) {
  const float* c = constants;
  const Rounding rounding{stochastic != 0, seed};
  if (c[2] == 0.0f)
    update_all(*layers, coefficients, SGD{c[0], c[1]}, rounding);
  else
    update_all(*layers, coefficients, MomentumSGD{c[0], c[1], c[2], c[3], c[4] != 0.0f}, rounding);
}

}  // extern "C"
