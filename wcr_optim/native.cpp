// The CPU's kernels: moments, shrink and fused optimizer steps, each one pass over memory, all layers in one call.
//
// Layers are cut into blocks, threads take blocks, and a block is worked on row by row. A row fits the first-level
// cache, so what is done to it one loop after another reads and writes memory once. Sums are in double, block by block
// in a fixed order: they depend neither on the number of threads nor on who asks, so a fused step leaves the very sums
// that measuring its weights would find.
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
inline void prefetch(const T* row) {
  constexpr int STEP = CACHE_LINE / sizeof(T);
  for (int i = 0; i < ROW; i += STEP) __builtin_prefetch(row + AHEAD + i);
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

// A NaN passes, and so does an infinity.
inline void shrink(float* w, int n, float gain, float threshold) {
  for (int i = 0; i < n; i++) {
    const float above = w[i] < -threshold ? -threshold : w[i];
    const float clamped = above > threshold ? threshold : above;
    w[i] = (w[i] - clamped) * gain;
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

  // Key of a row's random bits. Seeds count steps and starts count rows: scrambled one after the other, since a row
  // would meet its neighbour's bits in the next step if they were added up.
  uint32_t key(int64_t layer, int64_t start) const {
    const uint64_t of_layer = scramble(scramble(seed) + static_cast<uint64_t>(layer));
    return static_cast<uint32_t>(scramble(of_layer + static_cast<uint64_t>(start / ROW)));
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
  const int64_t* first;  // block of every layer
  double* partial;       // sums of every block, (blocks, 2)
  double* sums;          // sums of every layer, (count, 2)
};

namespace {

// Calls work(block, layer, start, n) for every row.
template <class Work>
void for_rows(const Layers& layers, const Work& work) {
#pragma omp parallel for num_threads(static_cast<int>(layers.threads)) schedule(static)
  for (int64_t block = 0; block < layers.blocks; block++) {
    const int64_t layer = std::upper_bound(layers.first, layers.first + layers.count, block) - layers.first - 1;
    const int64_t begin = (block - layers.first[layer]) * BLOCK;
    const int64_t end = std::min(begin + BLOCK, layers.sizes[layer]);
    for (int64_t start = begin; start < end; start += ROW)
      work(block, layer, start, static_cast<int>(std::min<int64_t>(ROW, end - start)));
  }
}

template <class T>
inline T* row_of(const Layers& layers, int stream, int64_t layer, int64_t start) {
  return reinterpret_cast<T*>(layers.addresses[stream * layers.count + layer]) + start;
}

inline void add_up(const float* w, int n, const Layers& layers, int64_t block) {
  Sums sums{layers.partial[2 * block], layers.partial[2 * block + 1]};
  add_up(w, n, sums);
  layers.partial[2 * block] = sums.m;
  layers.partial[2 * block + 1] = sums.q;
}

void finish(const Layers& layers) {
  for (int64_t layer = 0; layer < layers.count; layer++) {
    const int64_t next = layer + 1 < layers.count ? layers.first[layer + 1] : layers.blocks;
    for (int64_t block = layers.first[layer]; block < next; block++)
      for (int moment = 0; moment < 2; moment++) layers.sums[2 * layer + moment] += layers.partial[2 * block + moment];
  }
}

template <class T>
void sum_all(const Layers& layers) {
  for_rows(layers, [&](int64_t block, int64_t layer, int64_t start, int n) {
    T* row = row_of<T>(layers, 0, layer, start);
    float copy[ROW];
    prefetch(row);
    add_up(open(row, copy, n), n, layers, block);
  });
  finish(layers);
}

template <class T>
void shrink_all(const Layers& layers, const float* gain, const float* threshold, const Rounding& rounding) {
  for_rows(layers, [&](int64_t, int64_t layer, int64_t start, int n) {
    if (gain[layer] == 1.0f && threshold[layer] == 0.0f) return;
    T* row = row_of<T>(layers, 0, layer, start);
    float copy[ROW];
    prefetch(row);
    float* w = open(row, copy, n);
    shrink(w, n, gain[layer], threshold[layer]);
    round_row(row, w, n, rounding, rounding.key(layer, start));
    close(row, w, n);
  });
}

template <class T, class Update>
void update_all(const Layers& layers, const float* coefficients, const Update& update, const Rounding& rounding) {
  for_rows(layers, [&](int64_t block, int64_t layer, int64_t start, int n) {
    const float* c = coefficients + Update::COEFFICIENTS * layer;
    T* rows[Update::STREAMS];
    float copies[Update::STREAMS][ROW];
    float* opened[Update::STREAMS];
    for (int s = 0; s < Update::STREAMS; s++) {
      rows[s] = row_of<T>(layers, s, layer, start);
      opened[s] = open(rows[s], copies[s], n);
    }
    prefetch(rows[0]);
    if (c[0] != 1.0f || c[1] != 0.0f) {
      shrink(opened[0], n, c[0], c[1]);
      round_row(rows[0], opened[0], n, rounding, rounding.key(layer, start));
    }
    update(opened, n, c);
    for (int s = 0; s < Update::STREAMS; s++)
      if (s != 1) close(rows[s], opened[s], n);  // all but the gradient
    add_up(open(rows[0], copies[0], n), n, layers, block);
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

void wcr_sums(const Layers* layers) { layers->narrow ? sum_all<bfloat16>(*layers) : sum_all<float>(*layers); }

void wcr_shrink(const Layers* layers, int stochastic, uint64_t seed, const float* gain, const float* threshold) {
  const Rounding rounding{stochastic != 0, seed};
  layers->narrow ? shrink_all<bfloat16>(*layers, gain, threshold, rounding)
                 : shrink_all<float>(*layers, gain, threshold, rounding);
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
