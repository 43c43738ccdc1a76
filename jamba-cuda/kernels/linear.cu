// out (rows, n) = x (rows, k) W (n, k)^T + bias (n), for few rows (of quantised W: packed.cu, few.cu);
// and what cuBLASLt needs around it for more.
//
// linear_ROWS_OUTPUTS_WARPS  up to ROWS rows of x, OUTPUTS rows of W per WARPS warps, W read once
// linear_any                 the same for any alignment, 8 rows of x, a warp per row of W
// cast_bf16                  x rounded to bf16, rows padded with zeros to a multiple of 8
// add_bias                   out += bias
//
// Layout: x f32 with stride ldx, of which k columns are used; W with stride ldw, a
// multiple of 16 bytes, zeros beyond k; bias f32; out (rows, n) f32, contiguous.
// Threads: a block of 4 warps does 4 / WARPS groups of OUTPUTS rows of W. The lanes of a group
// walk over k in steps of 16 bytes of W; x stays in the L1 cache. The sums of its warps are added
// in order.
// Constraints: all but linear_any: k a multiple of 8, x and ldx of 16 bytes.

struct LinearArgs {
    const float* x;
    const weight_t* w;
    const float* bias;  // or null
    float* out;
    u32 rows, n, k;
    u32 ldx, ldw;
};

template <int ROWS, int OUTPUTS, int WARPS>
__device__ __forceinline__ void linear(const LinearArgs& a) {
    __shared__ float sums[4][ROWS * OUTPUTS];
    const u32 warp = threadIdx.x / 32, group = warp / WARPS;
    const u32 lane = threadIdx.x % (WARPS * 32), stride = WARPS * 32 * WEIGHT_VECTOR;
    const u32 first = (blockIdx.x * (4 / WARPS) + group) * OUTPUTS;
    const weight_t* w[OUTPUTS];
    // Rows beyond the last repeat it: their sums are not written.
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) w[j] = a.w + (u64)min(first + j, a.n - 1) * a.ldw;
    // The first weights come while the kernels before this one still run, the others a step ahead.
    uint4 packed[OUTPUTS];
    u32 k = lane * WEIGHT_VECTOR;
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) {
        packed[j] = k < a.k ? load_streaming(w[j] + k) : make_uint4(0, 0, 0, 0);
    }
    let_next_begin();
    await_inputs();
    const float* x[ROWS];
    float acc[ROWS][OUTPUTS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        x[r] = a.x + (u64)min((u32)r, a.rows - 1) * a.ldx;
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) acc[r][j] = 0.0f;
    }
#pragma unroll 2
    for (; k < a.k; k += stride) {
        float wide[OUTPUTS][WEIGHT_VECTOR];
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) {
            widen_16(packed[j], wide[j]);
            if (k + stride < a.k) packed[j] = load_streaming(w[j] + k + stride);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int v = 0; v < WEIGHT_VECTOR; v += 4) {
                const float4 in = *(const float4*)(x[r] + k + v);
#pragma unroll
                for (int j = 0; j < OUTPUTS; ++j) {
                    acc[r][j] += in.x * wide[j][v] + in.y * wide[j][v + 1] +
                                 in.z * wide[j][v + 2] + in.w * wide[j][v + 3];
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) {
            const float sum = warp_sum(acc[r][j]);
            if (threadIdx.x % 32 == 0) sums[warp][r * OUTPUTS + j] = sum;
        }
    }
    __syncthreads();
    for (u32 i = lane; i < ROWS * OUTPUTS; i += WARPS * 32) {
        const u32 r = i / OUTPUTS, j = first + i % OUTPUTS;
        if (r >= a.rows || j >= a.n) continue;
        float sum = 0.0f;
        for (u32 s = 0; s < WARPS; ++s) sum += sums[group * WARPS + s][i];
        a.out[(u64)r * a.n + j] = sum + (a.bias ? a.bias[j] : 0.0f);
    }
}

#define LINEAR(ROWS, OUTPUTS, WARPS)                                                      \
    extern "C" __global__ void __launch_bounds__(128)                                     \
        linear_##ROWS##_##OUTPUTS##_##WARPS(const LinearArgs a) {                         \
        linear<ROWS, OUTPUTS, WARPS>(a);                                                  \
    }
#define LINEAR_ROWS(ROWS) LINEAR(ROWS, 4, 4) LINEAR(ROWS, 1, 4) LINEAR(ROWS, 4, 1)
LINEAR_ROWS(1)
LINEAR_ROWS(2)
LINEAR_ROWS(4)
LINEAR_ROWS(8)

extern "C" __global__ void __launch_bounds__(128) linear_any(const LinearArgs a) {
    let_next_begin();
    await_inputs();
    const u32 j = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (j >= a.n) return;
    const weight_t* w = a.w + (u64)j * a.ldw;
    float acc[8] = {};
    for (u32 k = lane; k < a.k; k += 32) {
        const float weight = widen(w[k]);
        for (u32 r = 0; r < 8; ++r) {
            if (r < a.rows) acc[r] += a.x[(u64)r * a.ldx + k] * weight;
        }
    }
#pragma unroll
    for (u32 r = 0; r < 8; ++r) {
        const float sum = warp_sum(acc[r]);
        if (lane == 0 && r < a.rows) a.out[(u64)r * a.n + j] = sum + (a.bias ? a.bias[j] : 0.0f);
    }
}

struct CastArgs {
    const float* x;
    bf16* out;
    u32 k, ldx, ldo;
};

// A block per row and 2048 columns; 8 columns per thread.
extern "C" __global__ void __launch_bounds__(256) cast_bf16(const CastArgs a) {
    let_next_begin();
    await_inputs();
    const u32 c = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (c >= a.ldo) return;
    const float* x = a.x + (u64)blockIdx.x * a.ldx + c;
    float v[8];
    if (c + 8 <= a.k && (u64)x % 16 == 0) {
        const float4 low = *(const float4*)x, high = *(const float4*)(x + 4);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) v[i] = c + i < a.k ? x[i] : 0.0f;
    }
    *(uint4*)(a.out + (u64)blockIdx.x * a.ldo + c) =
        make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                   pack_bf16(v[6], v[7]));
}

struct BiasArgs {
    float* out;
    const float* bias;
    u32 n;
};

// A block per row, which walks over the columns.
extern "C" __global__ void __launch_bounds__(256) add_bias(const BiasArgs a) {
    let_next_begin();
    await_inputs();
    float* out = a.out + (u64)blockIdx.x * a.n;
    for (u32 j = threadIdx.x; j < a.n; j += 256) out[j] += a.bias[j];
}
