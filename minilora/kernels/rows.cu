// Kernels that compute row by row: R rows of D numbers. T is float or double, as in elementwise.cu.
//
// One block computes a row at a time and strides over the rows; its threads stride over the columns. Any number of blocks is
// right, and any power of two of threads up to MAX_THREADS. All sums have an order that depends on D and the threads alone:
// no atomics, the same bits every time. Branches around a barrier depend on the row or on an argument, never on the thread.

#define MAX_THREADS 1024
#define EACH_ROW(r, R) for (long long r = blockIdx.x; r < (R); r += gridDim.x)
#define EACH_COLUMN(j, D) for (long long j = threadIdx.x; j < (D); j += blockDim.x)

struct Sum {
    static __device__ T of(T a, T b) { return a + b; }
};
struct Largest {
    static __device__ T of(T a, T b) { return a > b ? a : b; }
};

__device__ T *one_for_each_thread()
{
    __shared__ T part[MAX_THREADS];
    return part;
}

// The values of all threads of the block, joined half with half: the same result for every thread.
template <class Join> __device__ T across(T value)
{
    T *part = one_for_each_thread();
    const unsigned int t = threadIdx.x;
    __syncthreads();  // everybody has read the result of the call before
    part[t] = value;
    for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half)
            part[t] = Join::of(part[t], part[t + half]);
    }
    __syncthreads();
    return part[0];
}

// ops/norm.py, LayerNorm; without `mean`, RMSNorm. w and b may be null. rstd is q there.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
norm_T(const T *x, const T *w, const T *b, T *y, T *mean, T *rstd, T eps, long long R, long long D)
{
    EACH_ROW(r, R) {
        const T *xr = x + r * D;
        T sum = T(0), squares = T(0);
        if (mean)
            EACH_COLUMN(j, D) sum += xr[j];
        const T m = mean ? across<Sum>(sum) / T(D) : T(0);
        EACH_COLUMN(j, D) squares += (xr[j] - m) * (xr[j] - m);
        const T q = T(1) / sqrt(across<Sum>(squares) / T(D) + eps);
        EACH_COLUMN(j, D) {
            const T xhat = (xr[j] - m) * q;
            y[r * D + j] = (w ? xhat * w[j] : xhat) + (b ? b[j] : T(0));
        }
        if (threadIdx.x == 0) {
            if (mean)
                mean[r] = m;
            rstd[r] = q;
        }
    }
}

// dx = q (g - mean(g) - xhat mean(g xhat)) with g = dy w; without `mean`, RMSNorm: the middle term is absent
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
norm_backward_T(const T *dy, const T *x, const T *w, const T *mean, const T *rstd, T *dx, long long R, long long D)
{
    EACH_ROW(r, R) {
        const T *xr = x + r * D, *dyr = dy + r * D;
        const T m = mean ? mean[r] : T(0), q = rstd[r];
        T sum = T(0), along = T(0);
        EACH_COLUMN(j, D) {
            const T g = w ? dyr[j] * w[j] : dyr[j];
            sum += g;
            along += g * ((xr[j] - m) * q);
        }
        const T mean_g = mean ? across<Sum>(sum) / T(D) : T(0), mean_along = across<Sum>(along) / T(D);
        EACH_COLUMN(j, D) {
            const T g = w ? dyr[j] * w[j] : dyr[j];
            dx[r * D + j] = q * (g - mean_g - (xr[j] - m) * q * mean_along);
        }
    }
}

// Sums of dy (to db) and of dy xhat (to dw) over `chunk` rows at a time: dw and db are (chunks, D), and may be null. Without
// dw, x, mean and rstd are not read. A thread adds up one column of one chunk; its neighbours have the columns beside it.
extern "C" __global__ void column_sums_T(const T *dy, const T *x, const T *mean, const T *rstd, T *dw, T *db, long long chunk,
                                         long long R, long long D)
{
    const long long chunks = (R + chunk - 1) / chunk;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < chunks * D; i += (long long)gridDim.x * blockDim.x) {
        const long long j = i % D, first = i / D * chunk, stop = first + chunk < R ? first + chunk : R;
        T along = T(0), sum = T(0);
        for (long long r = first; r < stop; ++r) {
            sum += dy[r * D + j];
            if (dw)
                along += dy[r * D + j] * ((x[r * D + j] - (mean ? mean[r] : T(0))) * rstd[r]);
        }
        if (dw)
            dw[i] = along;
        if (db)
            db[i] = sum;
    }
}

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

// ops/softmax.py, Softmax, along the rows
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
softmax_T(const T *x, T *y, long long R, long long D)
{
    EACH_ROW(r, R) {
        const T *xr = x + r * D;
        T *yr = y + r * D, largest = xr[0], sum = T(0);
        EACH_COLUMN(j, D) largest = Largest::of(xr[j], largest);
        largest = across<Largest>(largest);
        EACH_COLUMN(j, D) {
            yr[j] = exp(xr[j] - largest);
            sum += yr[j];
        }
        sum = across<Sum>(sum);
        EACH_COLUMN(j, D) yr[j] /= sum;
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
softmax_backward_T(const T *y, const T *dy, T *dx, long long R, long long D)
{
    EACH_ROW(r, R) {
        const T *yr = y + r * D, *dyr = dy + r * D;
        T sum = T(0);
        EACH_COLUMN(j, D) sum += dyr[j] * yr[j];
        sum = across<Sum>(sum);
        EACH_COLUMN(j, D) dx[r * D + j] = yr[j] * (dyr[j] - sum);
    }
}

// ops/attention.py, P of a block of scores z: R rows, `queries` of them for each of the matrices (heads of texts), the first
// being query `first` of `all`. Query t sees those of the D keys from t + behind to t + ahead. `mask` (may be null) is added to z:
// its steps lead from text to text of `heads` heads, head to head, query to query, key to key. m and n: (matrices, all).
#define QUERY                                                                                        \
    const long long t = first + r % queries, i = r / queries, place = i * all + t;                   \
    const long long open = t + ahead + 1 < D ? t + ahead + 1 : D, least = t + behind;                \
    const T *masks = mask ? mask + i / heads * to_text + i % heads * to_head + r % queries * to_query : mask;

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
masked_softmax_T(T *z, const T *mask, T *m, T *n, T lowest, long long first, long long queries, long long all, long long ahead,
                 long long behind, long long heads, long long to_text, long long to_head, long long to_query, long long to_key,
                 long long R, long long D)
{
    EACH_ROW(r, R) {
        QUERY
        T *zr = z + r * D, high = lowest, sum = T(0);
        EACH_COLUMN(j, open) {
            if (j < least)
                continue;
            if (masks)
                zr[j] += masks[j * to_key];
            high = Largest::of(zr[j], high);
        }
        high = across<Largest>(high);
        EACH_COLUMN(j, open) {
            if (j < least)
                continue;
            zr[j] = exp(zr[j] - high);
            sum += zr[j];
        }
        sum = across<Sum>(sum);
        if (sum == T(0))  // nothing may be attended
            sum = T(1);
        EACH_COLUMN(j, D) zr[j] = j < open && j >= least ? zr[j] / sum : T(0);
        if (threadIdx.x == 0) {
            m[place] = high;
            n[place] = sum;
        }
    }
}

// The same P once more, from m and n: every number by itself
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
masked_exp_T(T *z, const T *mask, const T *m, const T *n, long long first, long long queries, long long all, long long ahead,
             long long behind, long long heads, long long to_text, long long to_head, long long to_query, long long to_key,
             long long R, long long D)
{
    EACH_ROW(r, R) {
        QUERY
        T *zr = z + r * D;
        EACH_COLUMN(j, D) {
            if (j < open && j >= least)
                zr[j] = exp((masks ? zr[j] + masks[j * to_key] : zr[j]) - m[place]) / n[place];
            else
                zr[j] = T(0);
        }
    }
}

// Heads put in order, and back. x: R tokens (`all` of each text) of H heads of queries, then KV of keys, then KV of values, or of H
// heads alone; its steps lead from text to text, token to token, head to head. y: the queries block by block of `size` tokens, each
// block (texts, H, tokens, hd); behind them the keys, then the values, (texts, KV, all, hd). hd, D and the steps count what is moved
// at once: numbers, or as many as fill 16 bytes (`wide`).
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
            const long long h = D >> 32 ? j / hd : (unsigned int)j / (unsigned int)hd;  // the latter takes a quarter of the time
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

// ops/cross_entropy.py, to_gradient of one row: g = weight (p - t). g may be z itself: each thread reads a number, then writes it.
// A row of weight 0 is never read.
__device__ void row_gradient(const T *z, T *g, long long label, T weight, T largest, T total, T smoothing, long long D)
{
    const T scale = weight / total, on = weight * (T(1) - smoothing), everywhere = weight * (smoothing / T(D));
    EACH_COLUMN(j, D) {
        if (weight == T(0)) {
            g[j] = T(0);
            continue;
        }
        T p = exp(z[j] - largest) * scale;
        if (j == label)
            p -= on;
        g[j] = p - everywhere;
    }
}

// ops/cross_entropy.py: the weighted loss of every row of logits z, the row's largest logit and sum_j e^(z_j - largest) if they
// are wanted (not null), and the gradient if it is wanted; g may be z. A label that names no class gives NaN; of a
// row of weight 0 nothing is read.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
cross_entropy_T(const T *z, const long long *labels, const T *weights, T *losses, T *largest, T *total, T *g,
                T smoothing, long long R, long long D)
{
    EACH_ROW(r, R) {
        const T *zr = z + r * D;
        const long long columns = weights[r] == T(0) ? 0 : D;
        T high = columns ? zr[0] : T(0), n = T(0), below = T(0);
        EACH_COLUMN(j, columns) high = Largest::of(zr[j], high);
        high = across<Largest>(high);
        EACH_COLUMN(j, columns) {
            const T d = zr[j] - high;
            n += exp(d);
            below += d;
        }
        n = across<Sum>(n);
        if (smoothing > T(0))
            below = across<Sum>(below);
        const long long k = labels[r];
        if (threadIdx.x == 0) {
            T target = k >= 0 && k < columns ? zr[k] - high : T(nan(""));
            if (smoothing > T(0))  // else 0 times -infinity, where a class is forbidden, would be NaN
                target = (T(1) - smoothing) * target + below * (smoothing / T(D));
            losses[r] = columns ? weights[r] * (log(n) - target) : T(0);
            if (largest) {
                largest[r] = high;
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
