// The thin products of lora/gradient.py and lora/gradients/fused.py: N rows, and r <= RANK ranks. T is float or double, as in
// elementwise.cu, and RANK, for which launch.py compiles this text likewise, the next of 1, 2, 4, 8 and 16: ranks from r on are
// zeros that nobody reads or writes.
//
// A block computes a few rows of a product over their columns (z, u), or a few columns of one over the rows (dB, dA); it
// strides over such units, so any number of blocks is right, and any power of two of threads from 4 to THREADS. All sums have
// an order that depends on the shapes and the threads alone: no atomics, the same bits every time. Branches around a barrier
// depend on the unit or on an argument, never on the thread.
//
// A thin factor is given with its steps: rank j of column k is at[k * along + j * beside], so that a transpose is no copy.
//
// Of a fused projection some slots of `width` columns each have an update, those whose bit is set in `slots`: `enabled` slots,
// of r ranks each. A unit belongs to one of them. A plain layer is one slot as wide as y.

#define THREADS 256
#define ROWS 8    // the most that a block computes together: what it fetches of a factor serves all of them
#define STAGE 64  // rows of z or u in shared memory at a time
#define WIDE 32   // columns of a block that sums over rows
#define RESIDENT (sizeof(T) > 4 ? RANK > 8 ? 1 : 2 : RANK > 8 ? 2 : 4)  // blocks on a multiprocessor: who waits for memory
#define LANES (RANK < 4 ? RANK : 4)  // threads that share the ranks of a row
#define OWN (RANK / LANES)           // ranks of each
#define SOME (RANK < ROWS ? RANK : ROWS)

#ifdef __CUDACC_RTC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

struct Factor {
    const T *at;
    long long along, beside;
};

// ROWS numbers for each thread of the block: sums on their way, or rows of z or u
__device__ T *room()
{
    alignas(16) __shared__ T numbers[ROWS * THREADS];
    return numbers;
}

// z or u of the rows of the block, (ROWS, RANK)
__device__ T *of_rows()
{
    alignas(16) __shared__ T numbers[ROWS * RANK];
    return numbers;
}

__device__ long long smaller(long long a, long long b) { return a < b ? a : b; }

// The place among all slots of the one that is enabled as the `which`-th
__device__ int slot_of(unsigned long long slots, int which)
{
    int place = 0;
    for (; which || !(slots & 1); slots >>= 1, ++place)
        which -= slots & 1;
    return place;
}

template <int COUNT> struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack {
    T numbers[COUNT];
};

// Whether COUNT neighbours from F.at on, and as many in every other column, can be fetched together
template <int COUNT> __device__ bool packed(Factor F)
{
    const unsigned long long boundary = alignof(Pack<COUNT>);
    return F.beside == 1 && (unsigned long long)F.at % boundary == 0 && F.along * sizeof(T) % boundary == 0;
}

// COUNT ranks of column k, of which there are `ranks`; 0 for others
template <int COUNT> __device__ void fetch(Factor F, long long k, int ranks, bool together, T (&f)[COUNT])
{
    const T *at = F.at + k * F.along;
    if (together) {
        const Pack<COUNT> pack = *(const Pack<COUNT> *)at;
        UNROLL for (int j = 0; j < COUNT; ++j)
            f[j] = pack.numbers[j];
    } else {
        UNROLL for (int j = 0; j < COUNT; ++j)
            f[j] = j < ranks ? at[j * F.beside] : T(0);
    }
}

// The first `count` numbers of every thread in the room, joined half with half until `left` threads hold the sums
__device__ void join(int count, int left)
{
    T *part = room();
    const int t = threadIdx.x;
    for (int half = blockDim.x / 2; half >= left; half /= 2) {
        __syncthreads();
        if (t < half)
            for (int i = 0; i < count; ++i)
                part[i * THREADS + t] += part[i * THREADS + t + half];
    }
    __syncthreads();
}

// To of_rows(): sum_k x_nk F_kj, for `count` rows of K numbers, `next` apart. A thread has OWN ranks and takes every
// (threads / LANES)-th k; its neighbours have what lies beside in memory, other ranks or other k.
__device__ void rows_times(const T *x, long long next, Factor F, int count, int r, long long K)
{
    const int t = threadIdx.x, width = blockDim.x / LANES;
    const int lane = F.beside == 1 ? t % LANES : t / width, place = F.beside == 1 ? t / LANES : t % width;
    const int ranks = r - lane * OWN;
    F.at += lane * OWN * F.beside;
    const bool together = ranks >= OWN && packed<OWN>(F);
    T sums[ROWS][OWN] = {}, *part = room(), *result = of_rows();
    for (long long k = place; k < K; k += width) {
        T f[OWN];
        fetch<OWN>(F, k, ranks, together, f);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const T v = i < count ? x[i * next + k] : T(0);
            UNROLL for (int j = 0; j < OWN; ++j)
                sums[i][j] += v * f[j];
        }
    }
    UNROLL for (int j = 0; j < OWN; ++j) {
        __syncthreads();  // what the room held before has been read
        UNROLL for (int i = 0; i < ROWS; ++i)
            if (i < count)
                part[i * THREADS + place * LANES + lane] = sums[i][j];
        join(count, LANES);
        for (int i = t; i < count * LANES; i += blockDim.x) {
            const int rank = i % LANES * OWN + j;
            result[i / LANES * RANK + rank] = rank < r ? part[i / LANES * THREADS + i % LANES] : T(0);
        }
    }
    __syncthreads();
}

// y_nk += b_k + s sum_j z_nj F_kj, for `count` rows of K numbers, `next` apart, with z in of_rows(); b may be null. Without
// `add` y is not read, and neither is b.
__device__ void add_to_rows(T *y, long long next, Factor F, const T *b, T s, int count, int r, long long K, bool add)
{
    const T *z = of_rows();
    const bool together = r == RANK && packed<RANK>(F);
    for (long long k = threadIdx.x; k < K; k += blockDim.x) {
        asm volatile("" ::: "memory");  // reads z anew: kept in registers for all k, it would take most of them
        T f[RANK], before[ROWS];
        fetch<RANK>(F, k, r, together, f);
        const T bias = add && b ? b[k] : T(0);
        UNROLL for (int i = 0; i < ROWS; ++i)
            before[i] = add && i < count ? y[i * next + k] : T(0);
        UNROLL for (int i = 0; i < ROWS; ++i)
            if (i < count) {
                T sum = T(0);
                UNROLL for (int j = 0; j < RANK; ++j)
                    sum += z[i * RANK + j] * f[j];
                y[i * next + k] = add ? (b ? before[i] + bias : before[i]) + s * sum : s * sum;
            }
    }
}

// To out[k * along + j * beside]: sum_n v_nk (s w_nj) over the rows from `first` to `stop` - 1, for some columns from `column`
// on. The rows of v have K numbers and are `next` apart, those of w `next_w`. As many threads as there are columns take a row
// together, and the rows in turn.
__device__ void columns_times(const T *v, long long next, const T *w, long long next_w, T *out, long long along,
                              long long beside, T s, int r, long long first, long long stop, long long column, int columns,
                              long long K)
{
    const int t = threadIdx.x, groups = blockDim.x / columns, threads = blockDim.x;
    const long long k = column + t % columns;
    T sums[RANK] = {}, *part = room();
    for (long long n = first; n < stop; n += STAGE) {
        const int here = smaller(STAGE, stop - n);
        __syncthreads();  // what the room held before has been read
        for (int i = t; i < here * RANK; i += threads)
            part[i] = i % RANK < r ? s * w[(n + i / RANK) * next_w + i % RANK] : T(0);
        __syncthreads();
        for (int i = t / columns; k < K && i < here; i += ROWS * groups) {
            T ahead[ROWS];
            UNROLL for (int a = 0; a < ROWS; ++a)
                ahead[a] = i + a * groups < here ? v[(n + i + a * groups) * next + k] : T(0);
            UNROLL for (int a = 0; a < ROWS; ++a)
                if (i + a * groups < here)
                    UNROLL for (int j = 0; j < RANK; ++j)
                        sums[j] += ahead[a] * part[(i + a * groups) * RANK + j];
        }
    }
    UNROLL for (int from = 0; from < RANK; from += SOME) {
        __syncthreads();
        UNROLL for (int j = 0; j < SOME; ++j)
            part[j * THREADS + t] = sums[from + j];
        join(SOME, columns);
        for (int i = t; i < SOME * columns; i += threads) {
            const long long rank = from + i / columns, here = column + i % columns;
            if (rank < r && here < K)
                out[here * along + rank * beside] = part[i / columns * THREADS + i % columns];
        }
    }
}

// What the blocks do: for every chunk of rows first its groups of `rows` rows, then its groups of columns, of what is wanted;
// and each of them for every slot
struct Units {
    long long rows, chunk, N, of_rows, each, all, first, stop, row, column;  // the last four: of one unit
    int columns, slots, count, slot;                                         // the last two, too

    __device__ Units(bool by_rows, bool by_columns, long long rows, long long chunk, long long N, long long K, int slots)
        : rows(rows), chunk(chunk), N(N), columns(blockDim.x < WIDE ? blockDim.x : WIDE), slots(slots)
    {
        of_rows = by_rows ? (chunk + rows - 1) / rows : 0;
        each = (of_rows + (by_columns ? (K + columns - 1) / columns : 0)) * slots;
        all = (N + chunk - 1) / chunk * each;
    }

    // Whether unit i is of rows: `count` from `row` on. Else of columns, from `column` on, over the rows `first` to `stop` - 1.
    __device__ bool are_rows(long long i)
    {
        const long long place = i % each / slots;
        slot = i % slots;
        first = i / each * chunk;
        stop = smaller(first + chunk, N);
        row = first + place * rows;
        count = smaller(rows, stop - row);
        column = (place - of_rows) * columns;
        return place < of_rows;
    }
};

// z = x A^T, and in the columns of the slots y += b + s z B^T; b may be null. Without `add`, y = s z B^T there.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
low_rank_forward_T(const T *x, const T *A, const T *B, const T *b, T *z, T *y, T s, long long rows, long long A_along,
                   long long A_beside, long long B_along, long long B_beside, long long ranks, long long N, long long n_in,
                   long long n_out, long long add, long long slots, long long enabled, long long width)
{
    const int r = ranks;
    const long long all = (N + rows - 1) / rows * enabled;
    for (long long i = blockIdx.x; i < all; i += gridDim.x) {
        const long long n = i / enabled * rows, slot = i % enabled, first = slot_of(slots, slot) * width;
        const int count = smaller(rows, N - n);
        rows_times(x + n * n_in, n_in, {A + slot * r * A_beside, A_along, A_beside}, count, r, n_in);
        for (int k = threadIdx.x; k < count * r; k += blockDim.x)
            z[(n + k / r) * enabled * r + slot * r + k % r] = of_rows()[k / r * RANK + k % r];
        add_to_rows(y + n * n_out + first, n_out, {B + slot * width * B_along, B_along, B_beside}, b ? b + first : 0, s, count,
                    r, width, add);
    }
}

// In the columns of every slot u = dy B, and dB = s dy^T z over every chunk of rows: (chunks, enabled width, r). u or dB may be
// null, B with u and z with dB.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
low_rank_u_dB_T(const T *dy, const T *B, const T *z, T *u, T *dB, T s, long long rows, long long chunk, long long along,
                long long beside, long long ranks, long long N, long long n_out, long long slots, long long enabled,
                long long width)
{
    const int r = ranks;
    Units units(u, dB, rows, chunk, N, width, enabled);
    for (long long unit = blockIdx.x; unit < units.all; unit += gridDim.x) {
        const bool are_rows = units.are_rows(unit);
        const long long slot = units.slot;
        const T *columns = dy + slot_of(slots, slot) * width;
        if (are_rows) {
            rows_times(columns + units.row * n_out, n_out, {B + slot * width * along, along, beside}, units.count, r, width);
            for (int k = threadIdx.x; k < units.count * r; k += blockDim.x)
                u[(units.row + k / r) * enabled * r + slot * r + k % r] = of_rows()[k / r * RANK + k % r];
        } else {
            T *sums = dB + (unit / units.each * enabled + slot) * width * r;
            columns_times(columns, n_out, z + slot * r, enabled * r, sums, r, 1, s, r, units.first, units.stop, units.column,
                          units.columns, width);
        }
    }
}

// dA = s u^T x over every chunk of rows: (chunks, r, in); and dx += s u A, or without `add` dx = s u A. dA or dx may be null, x
// with dA and A with dx.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
low_rank_dA_dx_T(const T *u, const T *A, const T *x, T *dx, T *dA, T s, long long rows, long long chunk, long long along,
                 long long beside, long long ranks, long long N, long long n_in, long long add)
{
    const int r = ranks;
    Units units(dx, dA, rows, chunk, N, n_in, 1);
    for (long long unit = blockIdx.x; unit < units.all; unit += gridDim.x) {
        if (units.are_rows(unit)) {
            __syncthreads();  // the u before have been read
            for (int i = threadIdx.x; i < units.count * RANK; i += blockDim.x)
                of_rows()[i] = i % RANK < r ? u[(units.row + i / RANK) * r + i % RANK] : T(0);
            __syncthreads();
            add_to_rows(dx + units.row * n_in, n_in, {A, along, beside}, 0, s, units.count, r, n_in, add);
        } else {
            columns_times(x, n_in, u, r, dA + unit / units.each * n_in * r, 1, n_in, s, r, units.first, units.stop,
                          units.column, units.columns, n_in);
        }
    }
}

// The sums over the chunks: n numbers each for dA, m for dB; either may be null, with 0 numbers
extern "C" __global__ void low_rank_sums_T(const T *of_dA, const T *of_dB, T *dA, T *dB, long long chunks, long long n,
                                           long long m)
{
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n + m; i += (long long)gridDim.x * blockDim.x) {
        const T *of = i < n ? of_dA + i : of_dB + (i - n);
        T sum = T(0);
        for (long long chunk = 0; chunk < chunks; ++chunk)
            sum += of[chunk * (i < n ? n : m)];
        *(i < n ? dA + i : dB + (i - n)) = sum;
    }
}
