// lora/gradients/dora.py: the lengths c of the rows of V = W + s B A, and the factors rho = m / c. V exists nowhere: a number
// of it is made, squared and added up. T and RANK as in low_rank.cu: r <= RANK ranks, in `out / size` groups of rows each with
// ranks of its own.
//
// A thin factor is given with its steps: rank j of column k of A, or of row k of B, is at[k * along + j * beside]. All sums
// have an order that depends on n and the threads alone.

#define THREADS 256
#define ROWS 8   // the most that a block computes together: what it fetches of A serves all of them
#define WIDE 32  // rows of a block where W lies by columns

#ifdef __CUDACC_RTC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

// The length of row k; or, where there is m, rho and 1 / c, with 1 and 0 for a row too short to have a direction
__device__ void settle(T square, long long k, const T *m, T *result, T *inverse, T shortest)
{
    const T c = sqrt(square);
    const bool is_short = c < shortest;
    if (!m) {
        result[k] = c;
        return;
    }
    result[k] = is_short ? T(1) : m[k] / c;
    if (inverse)
        inverse[k] = is_short ? T(0) : T(1) / c;
}

// The first `count` numbers of every thread, joined half with half until `left` threads hold the sums
__device__ void join(T *part, int count, int left)
{
    const int t = threadIdx.x;
    for (int half = blockDim.x / 2; half >= left; half /= 2) {
        __syncthreads();
        if (t < half)
            for (int i = 0; i < count; ++i)
                part[i * THREADS + t] += part[i * THREADS + t + half];
    }
    __syncthreads();
}

// W (out, n) by rows: a block has `rows` of them, of one group
extern "C" __global__ void __launch_bounds__(THREADS)
dora_rows_T(const T *W, const T *A, const T *B, const T *m, T *result, T *inverse, T s, T shortest, long long A_along,
            long long A_beside, long long B_along, long long B_beside, long long ranks, long long size, long long out,
            long long n, long long rows)
{
    __shared__ T part[ROWS * THREADS], up[ROWS * RANK];
    const int t = threadIdx.x, r = ranks;
    const long long each = (size + rows - 1) / rows, all = out / size * each;
    for (long long unit = blockIdx.x; unit < all; unit += gridDim.x) {
        const long long group = unit / each, first = group * size + unit % each * rows, beyond = (group + 1) * size;
        const int count = beyond - first < rows ? beyond - first : rows;
        for (int i = t; i < ROWS * RANK; i += blockDim.x) {
            const bool there = i / RANK < count && i % RANK < r;
            up[i] = there ? s * B[(first + i / RANK) * B_along + i % RANK * B_beside] : T(0);
        }
        __syncthreads();
        const T *down = A + group * r * A_beside;
        T sums[ROWS] = {};
        for (long long k = t; k < n; k += blockDim.x) {
            asm volatile("" ::: "memory");  // reads `up` anew: kept in registers for all k, it would take most of them
            T a[RANK];
            UNROLL for (int j = 0; j < RANK; ++j)
                a[j] = j < r ? down[k * A_along + j * A_beside] : T(0);
            UNROLL for (int i = 0; i < ROWS; ++i)
                if (i < count) {
                    T v = T(0);
                    UNROLL for (int j = 0; j < RANK; ++j)
                        v += up[i * RANK + j] * a[j];
                    v += W[(first + i) * n + k];
                    sums[i] += v * v;
                }
        }
        UNROLL for (int i = 0; i < ROWS; ++i)
            part[i * THREADS + t] = sums[i];
        join(part, count, 1);
        for (int i = t; i < count; i += blockDim.x)
            settle(part[i * THREADS], first + i, m, result, inverse, shortest);
    }
}

// W (out, n) by columns: memory holds (n, out), and a block has some neighbours of every row there
extern "C" __global__ void __launch_bounds__(THREADS)
dora_columns_T(const T *W, const T *A, const T *B, const T *m, T *result, T *inverse, T s, T shortest, long long A_along,
               long long A_beside, long long B_along, long long B_beside, long long ranks, long long size, long long out,
               long long n)
{
    __shared__ T part[THREADS];
    const int t = threadIdx.x, r = ranks, wide = blockDim.x < WIDE ? blockDim.x : WIDE, deep = blockDim.x / wide;
    for (long long unit = blockIdx.x; unit < (out + wide - 1) / wide; unit += gridDim.x) {
        const long long k = unit * wide + t % wide;
        const T *down = A + k / size * r * A_beside;
        T up[RANK], sum = T(0);
        UNROLL for (int j = 0; j < RANK; ++j)
            up[j] = k < out && j < r ? s * B[k * B_along + j * B_beside] : T(0);
        for (long long i = t / wide; k < out && i < n; i += deep) {
            T v = T(0);
            UNROLL for (int j = 0; j < RANK; ++j)
                v += up[j] * (j < r ? down[i * A_along + j * A_beside] : T(0));
            v += W[i * out + k];
            sum += v * v;
        }
        part[t] = sum;
        join(part, 1, wide);
        if (t < wide && k < out)
            settle(part[t], k, m, result, inverse, shortest);
    }
}
