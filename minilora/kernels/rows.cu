// Losses, row by row.
#include "block.cuh"

// ops/loss.py, MSE: d = p - t, n numbers, and the sum of d^2 of every row of D of them; the last row may be shorter
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
mse_T(const T *p, const T *t, T *d, T *squares, long long n, long long R, long long D)
{
    EACH_ROW(r, R) {
        T sum = T(0);
        EACH_COLUMN(j, (r + 1) * D < n ? D : n - r * D) {
            const T e = p[r * D + j] - t[r * D + j];
            d[r * D + j] = e;
            sum += e * e;
        }
        sum = across<Sum>(sum);
        if (threadIdx.x == 0)
            squares[r] = sum;
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
    T own = T(LOWEST), sum = T(0);
    for (long long j = threadIdx.x; j < D; j += AHEAD * step) {
        T v[AHEAD], before = own;
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            v[i] = j + i * step < D ? z[j + i * step] : T(LOWEST);
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            own = Largest::of(v[i], own);
        sum *= exp(before - own);
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (j + i * step < D)
                sum += exp(v[i] - own);
    }
    *high = across<Largest>(own);
    return across<Sum>(sum * exp(own - *high)) + (*high - *high);
}

// ops/cross_entropy.py, to_gradient of one row: g = weight (p - t). g may be z itself: each thread reads a number, then writes
// it. From the row's end, which the caches still have. A row of weight 0 is never read.
__device__ void row_gradient(const T *z, T *g, long long label, T weight, T largest, T total, T smoothing, long long D)
{
    const T scale = weight / total, on = weight * (T(1) - smoothing), everywhere = weight * (smoothing / T(D));
    const long long step = blockDim.x, batch = AHEAD * step;
    for (long long j = (D - 1) / batch * batch + threadIdx.x; j >= 0; j -= batch) {
        T v[AHEAD];
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            v[i] = weight != T(0) && j + i * step < D ? z[j + i * step] : T(0);
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (j + i * step >= D)
                continue;
            T p = exp(v[i] - largest) * scale;
            if (j + i * step == label)
                p -= on;
            g[j + i * step] = weight != T(0) ? p - everywhere : T(0);
        }
    }
}

// ops/cross_entropy.py: the weighted loss of every row of logits z, the row's largest logit and sum_j e^(z_j - largest) if they
// are wanted (not null), and the gradient if it is wanted; g may be z. A label that names no class gives NaN; of a row of
// weight 0 nothing is read. The row is read twice (with smoothing three times), the second time from the cache where that holds the
// rows in work, and written once: 2 x 206 MB for 1,024 rows of GPT-2's 50,257 classes, 123 us of an H100's memory.
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
