// Products of one or two rows of x with a quantised matrix, on CUDA cores: what a decode step of few
// sequences does, bound by the bytes of W. (linear.cu: of W that is not quantised; few.cu: of more
// rows.)
//
//   linear_ROWS_WARPS   out = x W^T + bias
//   gated_ROWS_WARPS    out = silu(x W_gate^T) * (x W_up^T), W = [W_gate; W_up]
//   expert_gated_WARPS  the same for every entry, W that of its expert (moe.cu has what an entry is)
//   expert_down_WARPS   out = sum over the entries of a token of p x W[e]^T
//
// Layout: x (rows, ldx) f32; W of n rows (gated: 2 n) of `stride` bytes as PACKING says, its scales
// `scale_stride` bytes apart; bias f32; out (rows, ldo) f32. PACKING: 1 int8 with an f32 scale per
// row; 2 int8 and 3 four bits in blocks of 32 with a bf16 scale each (jamba_core::quant has the
// bytes).
// Threads: a block of 4 warps does 4 / WARPS groups of OUTPUTS rows of W, for one entry or token
// along y. The lanes of a group walk over k in steps of 16 bytes of W; x stays in the L1 cache. The
// sums of its warps are added in order.
// A quant q is not converted: its bits are put into the mantissa of a number that is q + OFFSET, and
// OFFSET times the sum of x is taken off. Of int8 this costs a thirteenth (x of one sign) to a
// thirtieth (of both) of what rounding x to bf16 would: 1e-4 and 5e-5 of the sum of 16, random ones
// simulated.
// Constraints: n at least 4, k a multiple of 4, x and ldx of 16 bytes, W and stride of 16.

#if PACKING == 3
#define LANE 32
#define OFFSET 24.0f
#else
#define LANE 16
#define OFFSET 32896.0f
#endif
#define OUTPUTS 4

struct PackedArgs {
    const float* x;
    const unsigned char* w;
    const unsigned char* scales;
    const float* bias;  // or null
    float* out;
    const u32* expert;  // of every entry
    const float* p;     // of every entry
    u32 rows, n, k;
    u32 ldx, ldo;       // elements
    u32 stride, scale_stride;
    u32 top_k;
};

// Two pairs of rows of W that a group multiplies at a time, the second row of a pair below the first,
// and what of them has been asked for.
struct Rows {
    const unsigned char* w[2];
    const unsigned char* scales[2];
    uint4 quants[OUTPUTS];
    u32 scale[OUTPUTS];

    __device__ __forceinline__ Rows(const PackedArgs& a, u64 first, u64 second) {
        w[0] = a.w + first * a.stride, w[1] = a.w + second * a.stride;
        scales[0] = a.scales + first * a.scale_stride, scales[1] = a.scales + second * a.scale_stride;
    }

    // Asks for the LANE weights from k on; zeros beyond the last.
    __device__ __forceinline__ void fetch(const PackedArgs& a, u32 k) {
        const bool valid = k < a.k;
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) {
            const u32 at = k / LANE * 16 + j % 2 * a.stride;
            const u32 scale_at = k / 32 * 2 + j % 2 * a.scale_stride;
            quants[j] = valid ? load_streaming(w[j / 2] + at) : make_uint4(0, 0, 0, 0);
            scale[j] =
                PACKING >= 2 && valid ? __ldg((const bf16*)(scales[j / 2] + scale_at)) : 0;
        }
    }

    // The factor that all weights of row j have in common.
    __device__ __forceinline__ float of_row(const PackedArgs& a, int j) const {
        const unsigned char* at = scales[j / 2] + j % 2 * a.scale_stride;
        return PACKING == 1 ? __ldg((const float*)at) : 1.0f;
    }
};

// Four quants of `word`, of the lower or the upper halves of its bytes where they are four bits,
// plus OFFSET.
__device__ __forceinline__ void shifted(u32 word, int half, float (&q)[4]) {
#if PACKING == 3
    // 0x41 1uuuu000 0000 0000 is 16 + u.
    const u32 bits = ((half ? word >> 1 : word << 3) & 0x78787878u) | 0x80808080u;
    const u32 above = 0x41000000u;
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = __uint_as_float(__byte_perm(bits, above, 0x7044 | i << 8));
#else
    // 0x4700uu00 is 2^15 + u, u = q + 128.
    const u32 bits = word ^ 0x80808080u, above = 0x47000000u;
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = __uint_as_float(__byte_perm(bits, above, 0x7404 | i << 4));
#endif
}

// acc += x W^T over the part of k of this lane, of `lanes` in a group; the first weights have been
// asked for, and were from k = lane * LANE on.
template <int ROWS>
__device__ __forceinline__ void multiply(const PackedArgs& a, Rows& rows,
                                         const float* const (&x)[ROWS], u32 lane, u32 lanes,
                                         float (&acc)[ROWS][OUTPUTS]) {
    for (u32 k = lane * LANE; k < a.k; k += lanes * LANE) {
        uint4 quants[OUTPUTS];
        float scale[OUTPUTS];
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) {
            quants[j] = rows.quants[j];
            scale[j] = PACKING >= 2 ? low_bf16(rows.scale[j]) : 1.0f;
        }
        rows.fetch(a, k + lanes * LANE);
#pragma unroll
        for (int half = 0; half < LANE / 16; ++half) {
            float in[ROWS][16], offset[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                offset[r] = 0.0f;
#pragma unroll
                for (int i = 0; i < 16; i += 4) {
                    const u32 at = k + half * 16 + i;
                    const float4 v = at < a.k ? *(const float4*)(x[r] + at)
                                              : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    in[r][i] = v.x, in[r][i + 1] = v.y, in[r][i + 2] = v.z, in[r][i + 3] = v.w;
                    offset[r] += v.x + v.y + (v.z + v.w);
                }
                offset[r] *= OFFSET;
            }
#pragma unroll
            for (int j = 0; j < OUTPUTS; ++j) {
                const u32 words[4] = {quants[j].x, quants[j].y, quants[j].z, quants[j].w};
                float sum[ROWS] = {};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float q[4];
                    shifted(words[i], half, q);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                        for (int v = 0; v < 4; ++v) sum[r] += in[r][4 * i + v] * q[v];
                    }
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) acc[r][j] += (sum[r] - offset[r]) * scale[j];
            }
        }
    }
}

// What thread of which group of a block, and the sums of a group.
template <int ROWS, int WARPS>
struct Group {
    u32 number, lane;
    float (*sums)[ROWS * OUTPUTS];  // of each warp

    __device__ __forceinline__ explicit Group(float (*all)[ROWS * OUTPUTS])
        : number(threadIdx.x / 32 / WARPS), lane(threadIdx.x % (32 * WARPS)),
          sums(all + threadIdx.x / 32 / WARPS * WARPS) {}

    // Adds the sums of all lanes; every thread of the block comes here.
    __device__ __forceinline__ void add(float (&acc)[ROWS][OUTPUTS]) {
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int j = 0; j < OUTPUTS; ++j) {
                const float sum = warp_sum(acc[r][j]);
                if (lane % 32 == 0) sums[lane / 32][r * OUTPUTS + j] = sum;
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ float sum(u32 r, u32 j) const {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp][r * OUTPUTS + j];
        return sum;
    }
};

template <int ROWS, int WARPS>
__device__ __forceinline__ void linear(const PackedArgs& a) {
    __shared__ float sums[4][ROWS * OUTPUTS];
    Group<ROWS, WARPS> group(sums);
    // Where rows are left over the last group does some of the one before again.
    const u32 first = min((blockIdx.x * (4 / WARPS) + group.number) * OUTPUTS, a.n - OUTPUTS);
    Rows rows(a, first, first + 2);
    // The first weights come while the kernels before this one still run, the others a step ahead.
    rows.fetch(a, group.lane * LANE);
    let_next_begin();
    await_inputs();
    const float* x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] = a.x + (u64)min((u32)r, a.rows - 1) * a.ldx;
    float acc[ROWS][OUTPUTS] = {};
    multiply<ROWS>(a, rows, x, group.lane, 32 * WARPS, acc);
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) {
        const float scale = rows.of_row(a, j);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) acc[r][j] *= scale;
    }
    group.add(acc);
    for (u32 i = group.lane; i < ROWS * OUTPUTS; i += 32 * WARPS) {
        const u32 r = i / OUTPUTS, j = first + i % OUTPUTS;
        if (r >= a.rows) continue;
        a.out[(u64)r * a.ldo + j] = group.sum(r, i % OUTPUTS) + (a.bias ? a.bias[j] : 0.0f);
    }
}

// Half of the rows of W are of the gate, the others go with them.
template <int ROWS, int WARPS, bool EXPERTS>
__device__ __forceinline__ void gated(const PackedArgs& a) {
    constexpr int PAIRS = OUTPUTS / 2;
    __shared__ float sums[4][ROWS * OUTPUTS];
    Group<ROWS, WARPS> group(sums);
    const u32 first = min((blockIdx.x * (4 / WARPS) + group.number) * PAIRS, a.n - PAIRS);
    const u32 entry = EXPERTS ? blockIdx.y : 0;
    let_next_begin();
    // Which weights they are is known only then.
    if (EXPERTS) await_inputs();
    const u64 of_expert = EXPERTS ? (u64)a.expert[entry] * 2 * a.n : 0;
    Rows rows(a, of_expert + first, of_expert + a.n + first);
    rows.fetch(a, group.lane * LANE);
    if (!EXPERTS) await_inputs();
    const float* x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const u32 row = EXPERTS ? entry / a.top_k : min((u32)r, a.rows - 1);
        x[r] = a.x + (u64)row * a.ldx;
    }
    float acc[ROWS][OUTPUTS] = {};
    multiply<ROWS>(a, rows, x, group.lane, 32 * WARPS, acc);
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) {
        const float scale = rows.of_row(a, j);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) acc[r][j] *= scale;
    }
    group.add(acc);
    for (u32 i = group.lane; i < ROWS * PAIRS; i += 32 * WARPS) {
        const u32 r = i / PAIRS, j = first + i % PAIRS;
        if (r >= a.rows) continue;
        const float value = silu(group.sum(r, i % PAIRS)) * group.sum(r, PAIRS + i % PAIRS);
        a.out[(u64)(entry + r) * a.ldo + j] = value;
    }
}

template <int WARPS>
__device__ __forceinline__ void expert_down(const PackedArgs& a) {
    __shared__ float sums[4][OUTPUTS];
    Group<1, WARPS> group(sums);
    // Where rows are left over the last group does some of the one before again.
    const u32 first = min((blockIdx.x * (4 / WARPS) + group.number) * OUTPUTS, a.n - OUTPUTS);
    let_next_begin();
    await_inputs();
    float acc[1][OUTPUTS] = {};
    for (u32 k = 0; k < a.top_k; ++k) {
        const u32 entry = blockIdx.y * a.top_k + k;
        const u64 of_expert = (u64)a.expert[entry] * a.n;
        Rows rows(a, of_expert + first, of_expert + first + 2);
        rows.fetch(a, group.lane * LANE);
        const float* x[1] = {a.x + (u64)entry * a.ldx};
        float of_entry[1][OUTPUTS] = {};
        multiply<1>(a, rows, x, group.lane, 32 * WARPS, of_entry);
        const float p = a.p[entry];
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) acc[0][j] += of_entry[0][j] * rows.of_row(a, j) * p;
    }
    group.add(acc);
    if (group.lane < OUTPUTS) {
        a.out[(u64)blockIdx.y * a.ldo + first + group.lane] = group.sum(0, group.lane);
    }
}

// With so many blocks of a multiprocessor as there are registers for.
#define BOUNDS(BLOCKS) __launch_bounds__(128, BLOCKS)
#define LINEAR(ROWS, WARPS, BLOCKS)                                                           \
    extern "C" __global__ void BOUNDS(BLOCKS) linear_##ROWS##_##WARPS(const PackedArgs a) {   \
        linear<ROWS, WARPS>(a);                                                               \
    }                                                                                         \
    extern "C" __global__ void BOUNDS(BLOCKS) gated_##ROWS##_##WARPS(const PackedArgs a) {    \
        gated<ROWS, WARPS, false>(a);                                                         \
    }
#define EACH(WARPS)                                                                           \
    LINEAR(1, WARPS, 6) LINEAR(2, WARPS, 5)                                                   \
    extern "C" __global__ void BOUNDS(6) expert_gated_##WARPS(const PackedArgs a) {           \
        gated<1, WARPS, true>(a);                                                             \
    }                                                                                         \
    extern "C" __global__ void BOUNDS(6) expert_down_##WARPS(const PackedArgs a) {            \
        expert_down<WARPS>(a);                                                                \
    }
EACH(1)
EACH(2)
EACH(4)
