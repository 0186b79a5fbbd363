// The steps of the LSTM's loop and of its backward (see lstm_loop.py), for float and double.
//
// T: steps, B: batch, H: hidden_size, K: width of codes, R: rank. Matrices lie row by row. The
// product of a step with its weights and what is pointwise behind it are one pass: sums of the four
// gates of L hidden units are vectors in registers, and never pass through memory as such.
//
// Weights come packed, K rows of four vectors a panel: `units` has the four gates of L units in
// them, `panels` 4 L columns in a row (lstm_steps.py). Columns past the last one are zeros.
// Vectors are GCC's and Clang's own (vector_size), so one source serves AVX-512 and AVX2.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 6;  // rows at a time: ROWS x WIDE sums fill most registers
#else
constexpr int BYTES = 32, ROWS = 3;
#endif
constexpr int WIDE = 4;
constexpr int64_t DEEP = 1024;  // inputs at a time: so much of a panel stays in the second cache

typedef float Floats __attribute__((vector_size(BYTES)));
typedef double Doubles __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
template <class S> struct Vector { typedef Floats Of; };
template <> struct Vector<double> { typedef Doubles Of; };
template <class S> using V = typename Vector<S>::Of;
template <class S> constexpr int64_t L = BYTES / sizeof(S);

template <class S> static inline V<S> load(const S* from, int64_t count) {
  V<S> x{};
  if (count >= L<S>) memcpy(&x, from, BYTES);
  else if (count > 0) memcpy(&x, from, count * sizeof(S));
  return x;
}

template <class S> static inline void store(S* to, V<S> x, int64_t count) {
  if (count >= L<S>) memcpy(to, &x, BYTES);
  else if (count > 0) memcpy(to, &x, count * sizeof(S));
}

// e^x = 2^n e^r, |r| <= log(2) / 2; e^r by Cephes' polynomial, within 2 units of the last place.
static inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  x = x > 87.0f ? Floats{} + 87.0f : x;
  const float round = 12582912.0f;  // 1.5 2^23: the sum's last bits are the integer
  Floats n = x * 1.44269504f + round;
  Ints power = ((Ints)n << 23) + (127 << 23);
  n = n - round;
  Floats r = x - n * 0.693359375f;  // log 2 in two parts
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (Floats)power;
}

static inline Doubles exponential(Doubles x) {
  for (int lane = 0; lane < BYTES / 8; lane++) x[lane] = std::exp(x[lane]);
  return x;
}

template <class S> static inline V<S> sigmoid(V<S> x) {
  return S(1) / (S(1) + exponential(-x));
}

// M rows of x, from `row` on, times one panel: `begin` sets the sums, `end` takes them.
template <class S, int M, class Begin, class End>
static inline void multiply(
    const S* x, int64_t stride, int64_t K, const S* panel, int64_t row, Begin begin, End end) {
  V<S> sums[M][WIDE];
  for (int m = 0; m < M; m++) begin(row + m, sums[m]);
  const S* from = x + row * stride;
  for (int64_t k = 0; k < K; k++, panel += WIDE * L<S>) {
    V<S> w[WIDE];
    for (int j = 0; j < WIDE; j++) w[j] = load(panel + j * L<S>, L<S>);
    for (int m = 0; m < M; m++)
      for (int j = 0; j < WIDE; j++) sums[m][j] += from[m * stride + k] * w[j];
  }
  for (int m = 0; m < M; m++) end(row + m, sums[m]);
}

// Some rows of all, which one thread works on for all steps: sequences do not meet.
struct Rows { int64_t first, behind; };

// These rows, in blocks of nearly the same size.
template <class S, class Begin, class End>
static inline void each_row(
    Rows rows, const S* x, int64_t stride, int64_t K, const S* panel, Begin begin, End end) {
  int64_t row = rows.first;
  for (int64_t blocks = (rows.behind - row + ROWS - 1) / ROWS; blocks > 0; blocks--) {
    int64_t count = (rows.behind - row + blocks - 1) / blocks;
    switch (count) {
      case 1: multiply<S, 1>(x, stride, K, panel, row, begin, end); break;
      case 2: multiply<S, 2>(x, stride, K, panel, row, begin, end); break;
      case 3: multiply<S, 3>(x, stride, K, panel, row, begin, end); break;
#if defined(__AVX512F__)
      case 4: multiply<S, 4>(x, stride, K, panel, row, begin, end); break;
      case 5: multiply<S, 5>(x, stride, K, panel, row, begin, end); break;
      case 6: multiply<S, 6>(x, stride, K, panel, row, begin, end); break;
#endif
    }
    row += count;
  }
}

// Rows of y (B, N), `apart` numbers apart, become those of x (B, K) times packed panels.
template <class S>
static void into(
    S* y, int64_t apart, int64_t N, Rows rows, const S* x, int64_t K, const S* panels) {
  for (int64_t n = 0; n < N; n += WIDE * L<S>, panels += K * WIDE * L<S>)
    for (int64_t k = 0; k < K; k += DEEP)
      each_row<S>(
          rows, x + k, K, K - k < DEEP ? K - k : DEEP, panels + k * WIDE * L<S>,
          [=](int64_t b, V<S>* sums) {
            for (int j = 0; j < WIDE; j++)
              sums[j] = load(y + b * apart + n + j * L<S>, k ? N - n - j * L<S> : 0);
          },
          [=](int64_t b, V<S>* sums) {
            for (int j = 0; j < WIDE; j++)
              store(y + b * apart + n + j * L<S>, sums[j], N - n - j * L<S>);
          });
}

// The rows of `some` that are among `rows`, of so many numbers each.
template <class S>
static void copy(S* to, const S* from, Rows some, Rows rows, int64_t width) {
  const int64_t first = some.first > rows.first ? some.first : rows.first;
  const int64_t behind = some.behind < rows.behind ? some.behind : rows.behind;
  if (first < behind)
    memcpy(to + first * width, from + first * width, sizeof(S) * (behind - first) * width);
}

// All B rows, shared out.
template <class Part>
static void shared(int64_t threads, int64_t B, Part part) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t n = 0; n < threads; n++) part(Rows{B * n / threads, B * (n + 1) / threads});
}

// codes (T, B, Kx + R): x's are given, and h's of the first step; h's of the others are filled in.
// u: units of [Ux | Uh] and bias: units of b, rows of g doubled; v: panels of V.
// cells: 2 c; (T + 1, B, H) if gates (T, B, 4 H) are kept or `all`, else (B, H), the first given.
// sizes (T + 1): how many sequences have each step, 0 last; `last` (B, H) gets 2 c at their ends.
template <class S>
static void forward(
    Rows rows, int64_t T, int64_t B, int64_t H, int64_t Kx, int64_t R, int64_t reverse, int64_t all,
    const int64_t* sizes, const S* u, const S* bias, const S* v,
    S* codes, S* cells, S* gates, S* output, S* last) {
  const int64_t K = Kx + R, size = B * H;
  for (int64_t step = 0; step < T; step++) {
    const int64_t t = reverse ? T - 1 - step : step, next = reverse ? t - 1 : t + 1;
    const S *before = cells + (all ? (reverse ? t + 1 : t) * size : 0), *panel = u;
    S *now = cells + (all ? (reverse ? t : t + 1) * size : 0), *h = output + t * size;
    for (int64_t n = 0; n < H; n += L<S>, panel += K * WIDE * L<S>)
      each_row<S>(
          rows, codes + t * B * K, K, K, panel,
          [=](int64_t, V<S>* sums) {
            for (int j = 0; j < WIDE; j++) sums[j] = load(bias + (n * WIDE + j * L<S>), L<S>);
          },
          [=](int64_t b, V<S>* sums) {
            const int64_t at = b * H + n, count = H - n;
            V<S> i = sigmoid<S>(sums[0]), f = sigmoid<S>(sums[1]), o = sigmoid<S>(sums[3]);
            V<S> g = sigmoid<S>(sums[2]) - S(0.5);  // tanh / 2
            V<S> c = f * load(before + at, count) + S(4) * i * g;  // 2 c
            store(now + at, c, count);
            store(h + at, o * (S(2) * sigmoid<S>(c) - S(1)), count);
            if (gates) {
              S* to = gates + (t * B + b) * WIDE * H + n;
              store(to, i, count);
              store(to + H, f, count);
              store(to + 2 * H, g, count);
              store(to + 3 * H, o, count);
            }
          });
    if (step + 1 < T) into<S>(codes + next * B * K + Kx, K, R, rows, h, H, v);
    if (!reverse) copy(last, now, Rows{sizes[t + 1], sizes[t]}, rows, H);
    else if (t == 0) copy(last, now, rows, rows, H);
  }
}

// A chunk of T steps, all that begins at its first: gates, d_output (T, B, H), cells (T + 1, B, H).
// vt: panels of V transposed, ut: panels of Uh transposed. z (B, R): gradient of the codes that the
// chunk before this one (in the order of backward) made, or null. dc (B, H): the gradient of c,
// carried on. slab (T, B, 4 H) gets the gradients of the preactivations, dz (T, B, R) of the codes.
template <class S>
static void backward(
    Rows rows, int64_t T, int64_t B, int64_t H, int64_t R, int64_t reverse,
    const int64_t* sizes, const S* d_last, const S* gates, const S* cells, const S* d_output,
    const S* vt, const S* ut, const S* z, S* dc, S* slab, S* dz) {
  const int64_t size = B * H;
  for (int64_t step = 0; step < T; step++) {
    const int64_t t = reverse ? step : T - 1 - step;
    const S* before = cells + (reverse ? t + 1 : t) * size;
    const S* now = cells + (reverse ? t : t + 1) * size;
    const S *saved = gates + t * WIDE * size, *dy = d_output + t * size, *panel = vt;
    S* found = slab + t * WIDE * size;
    if (d_last) copy(dc, d_last, Rows{sizes[t + 1], sizes[t]}, rows, H);
    for (int64_t n = 0; n < H; n += WIDE * L<S>, panel += R * WIDE * L<S>)
      each_row<S>(
          rows, z, R, z ? R : 0, panel,
          [=](int64_t b, V<S>* sums) {
            for (int j = 0; j < WIDE; j++)
              sums[j] = load(dy + b * H + n + j * L<S>, H - n - j * L<S>);
          },
          [=](int64_t b, V<S>* sums) {
            for (int j = 0; j < WIDE; j++) {
              const int64_t unit = n + j * L<S>, count = H - unit, at = b * H + unit;
              if (count <= 0) break;
              const S* gate = saved + b * WIDE * H + unit;
              S* to = found + b * WIDE * H + unit;
              V<S> i = load(gate, count), f = load(gate + H, count);
              V<S> g = load(gate + 2 * H, count), o = load(gate + 3 * H, count);  // g: tanh / 2
              V<S> tanh = sigmoid<S>(load(now + at, count)) - S(0.5), dh = sums[j];  // tanh / 2
              V<S> d = load(dc + at, count) + dh * (o - S(4) * o * tanh * tanh);
              store(to, d * (S(2) * g) * i * (S(1) - i), count);
              store(to + H, d * (S(0.5) * load(before + at, count)) * f * (S(1) - f), count);
              store(to + 2 * H, d * (i - S(4) * i * g * g), count);
              store(to + 3 * H, dh * (S(2) * tanh) * o * (S(1) - o), count);
              store(dc + at, d * f, count);
            }
          });
    S* here = dz + t * B * R;
    into<S>(here, R, R, rows, found, WIDE * H, ut);
    z = here;
  }
}

extern "C" {
int64_t vector_bytes() { return BYTES; }
#if defined(_OPENMP)
int64_t has_threads() { return 1; }
#else
int64_t has_threads() { return 0; }
#endif

#define FOR(S)                                                                                     \
  void forward_##S(                                                                                \
      int64_t threads, int64_t T, int64_t B, int64_t H, int64_t Kx, int64_t R, int64_t reverse,    \
      int64_t all, const int64_t* sizes, const S* u, const S* bias, const S* v,                    \
      S* codes, S* cells, S* gates, S* output, S* last) {                                          \
    shared(threads, B, [=](Rows rows) {                                                            \
      forward(                                                                                     \
          rows, T, B, H, Kx, R, reverse, all, sizes, u, bias, v, codes, cells, gates, output,      \
          last);                                                                                   \
    });                                                                                            \
  }                                                                                                \
  void backward_##S(                                                                               \
      int64_t threads, int64_t T, int64_t B, int64_t H, int64_t R, int64_t reverse,                \
      const int64_t* sizes, const S* d_last, const S* gates, const S* cells, const S* d_output,    \
      const S* vt, const S* ut, const S* z, S* dc, S* slab, S* dz) {                               \
    shared(threads, B, [=](Rows rows) {                                                            \
      backward(                                                                                    \
          rows, T, B, H, R, reverse, sizes, d_last, gates, cells, d_output, vt, ut, z, dc, slab,   \
          dz);                                                                                     \
    });                                                                                            \
  }

FOR(float)
FOR(double)
}
