// Losses, and the heads of attention put in order, row by row.
#include "block.cuh"

// ops/loss.py, MSE: g = scale (p - t) (may be null), n numbers, and the sum of (p - t)^2, over `count`, of every row of D of
// them; the last row may be shorter
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
mse_T(const T *p, const T *t, T *g, T *squares, T scale, T count, long long n, long long R, long long D)
{
    EACH_ROW(r, R) {
        T sum = T(0);
        EACH_COLUMN(j, (r + 1) * D < n ? D : n - r * D) {
            const T e = p[r * D + j] - t[r * D + j];
            if (g)
                g[r * D + j] = e * scale;
            sum += e * e;
        }
        sum = across<Sum>(sum);
        if (threadIdx.x == 0)
            squares[r] = sum / count;
    }
}

// y = the sum of a row, divided by n
extern "C" __global__ void __launch_bounds__(MAX_THREADS) mean_T(const T *x, T *y, T n, long long R, long long D)
{
    EACH_ROW(r, R) {
        T sum = T(0);
        EACH_COLUMN(j, D) sum += x[r * D + j];
        sum = across<Sum>(sum);
        if (threadIdx.x == 0)
            y[r] = sum / n;
    }
}

// Heads put in order, and back. x: R tokens (`all` of each text) of H heads of queries, then KV of keys, then KV of values, or
// of H heads alone; its steps lead from text to text, token to token, head to head. y: the queries block by block of `size`
// tokens, each block (texts, H, tokens, hd); behind them the keys, then the values, (texts, KV, all, hd). hd, D and the steps
// count what is moved at once: numbers, or as many as fill 16 bytes (`wide`).
struct alignas(16) Wide {
    T part[16 / sizeof(T)];
};

template <bool to_y, class U>
__device__ void move_heads(const U *from, U *to, long long all, long long size, long long H, long long KV, long long hd,
                           long long to_text, long long to_token, long long to_head, long long R, long long D)
{
    const long long texts = R / all;
    EACH_ROW(r, R) {
        const long long b = r / all, t = r % all, start = t - t % size, length = start + size < all ? size : all - start;
        EACH_COLUMN(j, D) {
            const long long h = D >> 32 ? j / hd : (unsigned int)j / (unsigned int)hd;  // the latter: a quarter of the time
            const long long kind = h < H ? 0 : h < H + KV ? 1 : 2;
            const long long row = kind ? texts * all * (H + (kind - 1) * KV) + (b * KV + h - H - (kind - 1) * KV) * all + t
                                       : texts * start * H + (b * H + h) * length + t - start;
            const long long x = b * to_text + t * to_token + h * to_head + j - h * hd, y = row * hd + j - h * hd;
            to[to_y ? y : x] = from[to_y ? x : y];
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
split_heads_T(const T *x, T *y, long long wide, long long all, long long size, long long H, long long KV, long long hd,
              long long to_text, long long to_token, long long to_head, long long R, long long D)
{
    if (wide)
        move_heads<true>((const Wide *)x, (Wide *)y, all, size, H, KV, hd, to_text, to_token, to_head, R, D);
    else
        move_heads<true>(x, y, all, size, H, KV, hd, to_text, to_token, to_head, R, D);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
join_heads_T(const T *y, T *x, long long wide, long long all, long long size, long long H, long long KV, long long hd,
             long long to_text, long long to_token, long long to_head, long long R, long long D)
{
    if (wide)
        move_heads<false>((const Wide *)y, (Wide *)x, all, size, H, KV, hd, to_text, to_token, to_head, R, D);
    else
        move_heads<false>(y, x, all, size, H, KV, hd, to_text, to_token, to_head, R, D);
}

// Numbers that a thread reads before it does anything with them. With 1,024 threads 32 KB are on their way to a multiprocessor;
// what the memory of an H100 sends it in 0.7 us, the time of a way, are 18. So 4 bytes at a time are enough, and rows of an odd
// length, which no wide load can read, are as fast as others.
#define AHEAD 8

// The largest number of a row, to `high`, and the sum of e^(z_j - high): one pass, in which a thread's sum is rescaled when its
// own largest number grows. Infinity gives NaN, as infinity minus itself; where all is -infinity the sum is 0, and high finite.
//
// Error of the sum, of first order in u = eps / 2: a term has met up to K + 2 exps, of 4 u (2 units in the last place), and
// products, K = D / (AHEAD threads) the batches of a thread. The roundings of the differences in the exps are at most
// u (high - z_j) for a term, as they add up to that; weighted with the terms, that is u times the entropy of the softmax, less
// log(sum), at most u log D. The additions are K AHEAD and log2(threads). So in all u (5 (K + 2) + log D + K AHEAD + 10) of the
// sum; the sum alone, of two passes, had u (4 + log D + K AHEAD + 10).
__device__ T softmax_sum(const T *z, T *high, long long D)
{
    const long long step = blockDim.x;
    const T absent = log(T(0));  // adds nothing to a sum; without a branch the exps of a thread are computed side by side
    T own = T(LOWEST), sum = T(0);
    for (long long j = threadIdx.x; j < D; j += AHEAD * step) {
        T v[AHEAD], before = own;
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            v[i] = j + i * step < D ? z[j + i * step] : absent;
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            own = Largest::of(v[i], own);
        sum *= exp(before - own);
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            sum += exp(v[i] - own);
    }
    *high = across<Largest>(own);
    return across<Sum>(sum * exp(own - *high)) + (*high - *high);
}

// ops/rotary.py: y = x cos + turn(x) sin, and with `sign` -1 the turn back. Memory holds rows of D numbers, `heads` heads of
// hd; row r is the token r % all. Rows are those of a text, or with `each` heads in turn: of a head, then of the next one. The
// angles of (text, head, token) begin at the row to_text text + to_head head + to_token token of cos and sin.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
rotary_T(const T *x, T *y, const T *cos, const T *sin, T sign, long long all, long long each, long long hd, long long to_text,
         long long to_head, long long to_token, long long R, long long D)
{
    const long long half = hd / 2;
    EACH_ROW(r, R) {
        const long long t = r % all, text = r / all / each, head = r / all % each;
        EACH_COLUMN(j, D) {
            const long long h = D >> 32 ? j / hd : (unsigned int)j / (unsigned int)hd, i = j - h * hd, own = r * D + j;
            const long long angle = (text * to_text + (head + h) * to_head + t * to_token) * half + (i < half ? i : i - half);
            const T other = x[i < half ? own + half : own - half] * (sign * sin[angle]);
            y[own] = i < half ? x[own] * cos[angle] - other : x[own] * cos[angle] + other;
        }
    }
}

// ops/cross_entropy.py, to_gradient of one row: g = weight (p - t). g may be z itself: each thread reads a number, then writes
// it. From the row's end, which the caches still have. A row of weight 0 is never read.
__device__ void row_gradient(const T *z, T *g, long long label, T weight, T largest, T total, T smoothing, long long D)
{
    const T scale = weight / total, on = weight * (T(1) - smoothing), everywhere = weight * (smoothing / T(D));
    const long long step = blockDim.x, batch = AHEAD * step;
    if (weight == T(0)) {
        EACH_COLUMN(j, D) g[j] = T(0);
        return;
    }
    for (long long j = (D - 1) / batch * batch + threadIdx.x; j >= 0; j -= batch) {
        T v[AHEAD];
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            v[i] = j + i * step < D ? z[j + i * step] : T(0);
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const T p = exp(v[i] - largest) * scale;
            v[i] = (j + i * step == label ? p - on : p) - everywhere;
        }
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (j + i * step < D)
                g[j + i * step] = v[i];
    }
}

// ops/cross_entropy.py: the weighted loss of every row of logits z, the row's largest logit and sum_j e^(z_j - largest) if they
// are wanted (not null), and the gradient if it is wanted; g may be z. A label that names no class gives NaN; of a row of
// weight 0 nothing is read. The row is read twice (with smoothing three times), the second time from the cache where that holds
// the rows in work, and written once: 2 x 206 MB for 1,024 rows of GPT-2's 50,257 classes, 123 us of an H100's memory.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
cross_entropy_T(const T *z, const long long *labels, const T *weights, T *losses, T *largest, T *total, T *g,
                T smoothing, long long R, long long D)
{
    EACH_ROW(r, R) {
        const T *zr = z + r * D;
        const long long columns = weights[r] == T(0) ? 0 : D;
        T high, below = T(0);
        const T n = softmax_sum(zr, &high, columns);
        if (smoothing > T(0)) {
            EACH_COLUMN(j, columns) below += zr[j] - high;
            below = across<Sum>(below);
        }
        const long long k = labels[r];
        if (threadIdx.x == 0) {
            T target = k >= 0 && k < columns ? zr[k] - high : T(nan(""));
            if (smoothing > T(0))  // else 0 times -infinity, where a class is forbidden, would be NaN
                target = (T(1) - smoothing) * target + below * (smoothing / T(D));
            losses[r] = columns ? weights[r] * (log(n) - target) : T(0);
            if (largest) {
                largest[r] = columns ? high : T(0);
                total[r] = columns ? n : T(1);
            }
        }
        __syncthreads();  // thread 0 has read its z before g takes the place
        if (g)
            row_gradient(zr, g + r * D, k, weights[r], high, n, smoothing, D);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
cross_entropy_backward_T(const T *z, const long long *labels, const T *weights, const T *largest, const T *total,
                         T *g, T smoothing, long long R, long long D)
{
    EACH_ROW(r, R)
        row_gradient(z + r * D, g + r * D, labels[r], weights[r], largest[r], total[r], smoothing, D);
}
