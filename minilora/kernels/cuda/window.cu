// ops/window.py: the columns of images x (N, C, H, W), X (C KH KW, OH OW N), and back. A row of X belongs to a channel and a
// kernel place, a column to an output and a sample, samples last. Numbers are copied, or added up in the order of the kernel
// places.

#define PIECE 2048  // columns of a row that a block copies

// Where one axis is read: output o meets kernel place k there
__device__ long long met(long long o, long long k, long long stride, long long padding, long long dilation)
{
    return o * stride + k * dilation - padding;
}

// Which output reads i at kernel place k; -1 for none
__device__ long long reader(long long i, long long k, long long stride, long long padding, long long dilation,
                            long long outputs)
{
    const long long distance = i + padding - k * dilation;
    return distance < 0 || distance % stride || distance / stride >= outputs ? -1 : distance / stride;
}

extern "C" __global__ void columns_T(const T *x, T *X, long long N, long long C, long long H, long long W, long long KH,
                                     long long KW, long long SH, long long SW, long long PH, long long PW, long long DH,
                                     long long DW, long long OH, long long OW)
{
    const long long all = OH * OW * N, pieces = (all + PIECE - 1) / PIECE, units = C * KH * KW * pieces;
    const bool small = all >> 31 == 0;  // then divisions take a quarter of the time
    for (long long unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const long long row = unit / pieces, first = unit % pieces * PIECE;
        const long long kw = row % KW, kh = row / KW % KH, c = row / KW / KH;
        const long long stop = first + PIECE < all ? first + PIECE : all;
        for (long long j = first + threadIdx.x; j < stop; j += blockDim.x) {
            const long long o = small ? (unsigned int)j / (unsigned int)N : j / N, n = j - o * N;
            const long long oh = small ? (unsigned int)o / (unsigned int)OW : o / OW, ow = o - oh * OW;
            const long long h = met(oh, kh, SH, PH, DH), w = met(ow, kw, SW, PW, DW);
            const bool inside = 0 <= h && h < H && 0 <= w && w < W;
            X[row * all + j] = inside ? x[((n * C + c) * H + h) * W + w] : T(0);
        }
    }
}

// The adjoint: what stands in `into` and every number of X that `columns` would have copied from there
extern "C" __global__ void from_columns_T(const T *X, T *into, long long N, long long C, long long H, long long W, long long KH,
                                          long long KW, long long SH, long long SW, long long PH, long long PW, long long DH,
                                          long long DW, long long OH, long long OW)
{
    const long long all = OH * OW * N, numbers = N * C * H * W;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < numbers; i += (long long)gridDim.x * blockDim.x) {
        const long long w = i % W, h = i / W % H, c = i / W / H % C, n = i / W / H / C;
        T sum = into[i];
        for (long long kh = 0; kh < KH; ++kh) {
            const long long oh = reader(h, kh, SH, PH, DH, OH);
            for (long long kw = 0; oh >= 0 && kw < KW; ++kw) {
                const long long ow = reader(w, kw, SW, PW, DW, OW);
                if (ow >= 0)
                    sum += X[((c * KH + kh) * KW + kw) * all + (oh * OW + ow) * N + n];
            }
        }
        into[i] = sum;
    }
}
