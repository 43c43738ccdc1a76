// Products of few rows of x with a matrix, in bf16: each weight is read once, from memory straight
// into the operands of the tensor cores, and dequantised on the way.
//
//   linear_*         out = x W^T + bias
//   gated_*          out = silu(x W_gate^T) * (x W_up^T), W = [W_gate; W_up]
//   expert_gated_*   the same for the entries of an expert, whose W it is
//   expert_linear_*  out = x W[e]^T for the entries of expert e
//
// *_8 to *_64 take up to so many rows of x a tile. (packed.cu: fewer rows, quantised.)
//
// Layout: x (rows, ldx) bf16; W of n rows (gated: 2 n) of `stride` bytes as PACKING says, its scales
// `scale_stride` bytes apart; bias f32; out (rows, ldo) of f32, of gated_* of bf16, with zeros
// beyond n. PACKING: 0 bf16; 1 int8 with an f32 scale per row; 2 int8 and 3 four bits in
// blocks of 32 with a bf16 scale each (jamba_core::quant has the bytes).
// Weights in blocks are scaled before the product, and rounded to bf16; those of rows after it.
// Threads: a block has 16 rows of W (gated: 16 and the 16 that go with them; *_64: 32), its warps
// take turns along k. mma has W as the left operand, x as the right one: rows of x are columns of
// the result. A lane reads 16 bytes of two rows of W, LANE weights that follow each other in k, and
// takes the same LANE values of its row of x: the tensor core sees k in another order than memory
// has it, the same for both operands. The sums of the warps are added in their order.
// Experts: a tile of entries is found among the sorted ones, see moe.cu; grid along x.
// Constraints: x and ldx of 16 bytes, k a multiple of 8 or x zero up to it; W and stride of 16.

#if PACKING == 0
#define LANE 8
#elif PACKING == 3
#define LANE 32
#else
#define LANE 16
#endif
#define STEP (4 * LANE)  // columns of a step of a warp: 64 bytes of each row
#define IN_BLOCKS (PACKING >= 2)

struct FewArgs {
    const void* x;
    const unsigned char* w;
    const unsigned char* scales;
    const float* bias;  // or null
    void* out;
    const u32* start;   // (experts + 1): of the sorted entries
    const u32* sorted;  // numbers of the sorted entries, or null where x is sorted
    u32 rows, n, k;
    u32 ldx, ldo;       // elements
    u32 stride, scale_stride;
    u32 experts, top_k;
    u32 ahead;          // bytes of each row of W to bring to the L2 cache early
};

// Eight of the weights in 16 bytes, number `part`, as pairs in their order.
__device__ __forceinline__ void unpack(const uint4& raw, int part, u32 scale, u32 (&pairs)[4]) {
#if PACKING == 0
    pairs[0] = raw.x, pairs[1] = raw.y, pairs[2] = raw.z, pairs[3] = raw.w;
#else
#if PACKING == 3
    u32 words[2] = {part % 2 ? raw.z : raw.x, part % 2 ? raw.w : raw.y};
#else
    const u32 words[2] = {part ? raw.z : raw.x, part ? raw.w : raw.y};
#endif
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#if PACKING == 3
            const u32 nibbles = (part < 2 ? words[i] : words[i] >> 4) & 0x0f0f0f0fu;
            const u32 q = widen_int4(nibbles, j);
#else
            const u32 q = widen_int8(words[i], j);
#endif
            pairs[2 * i + j] = IN_BLOCKS ? scale_bf16(q, scale) : q;
        }
    }
#endif
}

// Eight values of x as pairs.
__device__ __forceinline__ void load_x(const bf16* x, bool valid, u32 (&pairs)[4]) {
    const uint4 v = valid ? *(const uint4*)x : make_uint4(0, 0, 0, 0);
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
}
// As mma_bf16, but free to move: it is the order of loads that matters here.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Tile {
    u32 expert, first, last;  // sorted entries
};

// The expert and entries of tile `index`, first == last if there is none. All lanes of a warp.
__device__ __forceinline__ Tile find_tile(const FewArgs& a, u32 index, u32 size) {
    const u32 lane = threadIdx.x % 32;
    for (u32 base = 0; base < a.experts; base += 32) {
        const bool valid = base + lane < a.experts;
        const u32 first = valid ? a.start[base + lane] : 0;
        const u32 last = valid ? a.start[base + lane + 1] : 0;
        const u32 own = (last - first + size - 1) / size;
        u32 before = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const u32 other = __shfl_up_sync(FULL, before, step);
            if (lane >= step) before += other;
        }
        const u32 all = __shfl_sync(FULL, before, 31);
        if (index < all) {
            const u32 owner = __ffs(__ballot_sync(FULL, index < before)) - 1;
            const u32 within = index - __shfl_sync(FULL, before - own, owner);
            const u32 from = __shfl_sync(FULL, first, owner) + within * size;
            return Tile{base + owner, from, min(from + size, __shfl_sync(FULL, last, owner))};
        }
        index -= all;
    }
    return Tile{0, 0, 0};
}

// Warps of a block at most: launchers count with them too, ops/few.rs.
#define MOST_WARPS(TILES, COLUMNS) \
    (COLUMNS == 1 ? 16 / TILES : TILES * COLUMNS <= 8 ? 8 : 64 / (TILES * COLUMNS))

// TILES: of 16 rows of W that a warp multiplies at a time; COLUMNS: of 8 rows of x.
template <int TILES, int COLUMNS, bool GATED, bool EXPERTS>
__device__ __forceinline__ void few(const FewArgs& a) {
    constexpr int WARPS = MOST_WARPS(TILES, COLUMNS);
    // Steps whose weights a warp has asked for, of 1 KiB for each 16 rows: enough where registers
    // leave room for 32 warps of a multiprocessor.
    constexpr int AHEAD = 2 / TILES;
    constexpr int SUMS = TILES * COLUMNS * 128;
    constexpr u32 ROWS = GATED ? 16 : 16 * TILES;  // of the result's columns
    __shared__ float sums[WARPS][SUMS];
    const u32 warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_begin();
    Tile tile{0, 0, 0};
    if (EXPERTS) {
        await_inputs();
        tile = find_tile(a, blockIdx.x, 8 * COLUMNS);
        if (tile.first == tile.last) return;
    } else {
        tile.first = blockIdx.y * 8 * COLUMNS;
        tile.last = min(a.rows, tile.first + 8 * COLUMNS);
    }
    const u32 j0 = (EXPERTS ? blockIdx.y : blockIdx.x) * ROWS;
    const u64 of_expert = (u64)tile.expert * (GATED ? 2 * a.n : a.n);
    const u32 group = lane / 4, part = lane % 4;

    // Rows beyond the last repeat it: their sums are not written.
    auto row_of_w = [&](u32 m, u32 row) {
        return of_expert + (GATED ? m * a.n : 0) + min(j0 + (GATED ? 0 : m * 16) + row, a.n - 1);
    };
    const unsigned char* w[TILES];
    const unsigned char* scales[TILES];
    // From the upper row of a lane to its lower one, which are the same where they are the last.
    u32 down[TILES], scales_down[TILES];
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
        const u64 row = row_of_w(m, group);
        const u32 rows_down = (u32)(row_of_w(m, 8 + group) - row);
        down[m] = rows_down * a.stride, scales_down[m] = rows_down * a.scale_stride;
        w[m] = a.w + row * a.stride + part * 16;
        scales[m] = a.scales + row * a.scale_stride;
    }
    const u32 steps = (a.k + STEP - 1) / STEP;
    uint4 raw[AHEAD][TILES][2];
    u32 scale[AHEAD][TILES][2];
    auto fetch = [&](int i, u32 step) {
        const bool valid = step * STEP + part * LANE < a.k;
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            const unsigned char* from = w[m] + (u64)step * 64;
            const unsigned char* scale_from = scales[m] + (step * STEP + part * LANE) / 32 * 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 below = half ? down[m] : 0, scale_below = half ? scales_down[m] : 0;
                raw[i][m][half] = valid ? load_streaming(from + below) : make_uint4(0, 0, 0, 0);
                scale[i][m][half] =
                    IN_BLOCKS && valid ? __ldg((const bf16*)(scale_from + scale_below)) : 0;
            }
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch(i, warp + i * warps);
    if (!EXPERTS) {
        // What follows, while kernels before this one still run.
        const u32 from = warps * AHEAD * 64;
        if (warp == 0 && lane < 16 * TILES && from < a.stride) {
            const u64 row = row_of_w(lane / 16, lane % 16);
            prefetch_l2(a.w + row * a.stride + from, min(a.stride - from, a.ahead));
        }
        await_inputs();
    }
    const bf16* x[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        const u32 i = min(tile.first + c * 8 + group, tile.last - 1);
        const u32 row = EXPERTS && a.sorted ? a.sorted[i] / a.top_k : i;
        x[c] = (const bf16*)a.x + (u64)row * a.ldx + part * LANE;
    }
    float acc[TILES][COLUMNS][4] = {};
    for (u32 first = warp; first < steps; first += warps * AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const u32 step = first + i * warps, k = step * STEP;
            if (step >= steps) break;
            uint4 now[TILES][2];
            u32 now_scale[TILES][2];
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    now[m][half] = raw[i][m][half];
                    now_scale[m][half] = scale[i][m][half] * 0x10001u;
                }
            }
            fetch(i, step + warps * AHEAD);
#pragma unroll
            for (int p = 0; p < LANE / 8; ++p) {
                u32 right[COLUMNS][4];
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    load_x(x[c] + k + p * 8, k + part * LANE + p * 8 < a.k, right[c]);
                }
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
                    u32 upper[4], lower[4];
                    unpack(now[m][0], p, now_scale[m][0], upper);
                    unpack(now[m][1], p, now_scale[m][1], lower);
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) {
                        multiply(acc[m][c], upper[0], lower[0], upper[1], lower[1], right[c][0],
                                 right[c][1]);
                        multiply(acc[m][c], upper[2], lower[2], upper[3], lower[3], right[c][2],
                                 right[c][3]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[warp][((m * COLUMNS + c) * 4 + i) * 32 + lane] = acc[m][c][i];
            }
        }
    }
    __syncthreads();
    // The sum of row `r` of W and row `t` of x, and its scale.
    auto sum = [&](u32 r, u32 t) {
        const u32 at = ((r / 16 * COLUMNS + t / 8) * 4 + r % 16 / 8 * 2 + t % 2) * 32 +
                       r % 8 * 4 + t % 8 / 2;
        float total = 0.0f;
        for (u32 i = 0; i < warps; ++i) total += sums[i][at];
        return total;
    };
    auto row_scale = [&](u64 row) {
        return PACKING == 1 ? *(const float*)(a.scales + row * a.scale_stride) : 1.0f;
    };
    for (u32 e = threadIdx.x; e < ROWS * 8 * COLUMNS; e += blockDim.x) {
        const u32 r = e % ROWS, t = e / ROWS, j = j0 + r;
        if (tile.first + t >= tile.last) break;
        const u64 at = (u64)(tile.first + t) * a.ldo + j;
        if (GATED) {
            if (j >= a.ldo) continue;
            float value = 0.0f;
            if (j < a.n) {
                value = silu(sum(r, t) * row_scale(of_expert + j)) *
                        (sum(16 + r, t) * row_scale(of_expert + a.n + j));
            }
            ((bf16*)a.out)[at] = to_bf16(value);
        } else if (j < a.n) {
            const float bias = a.bias ? a.bias[j] : 0.0f;
            ((float*)a.out)[at] = sum(r, t) * row_scale(of_expert + j) + bias;
        }
    }
}

// Blocks of so many warps for which there are registers.
#define LEAST(TILES, COLUMNS) \
    (COLUMNS == 1 ? 1 + TILES : COLUMNS == 2 ? 4 - TILES : COLUMNS == 4 ? 3 - TILES : 1)
#define FEW(NAME, TILES, COLUMNS, GATED, EXPERTS)                                     \
    extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS(TILES, COLUMNS),        \
                                                 LEAST(TILES, COLUMNS)) NAME(const FewArgs a) { \
        few<TILES, COLUMNS, GATED, EXPERTS>(a);                                       \
    }
FEW(linear_8, 1, 1, false, false)
FEW(linear_16, 1, 2, false, false)
FEW(linear_32, 1, 4, false, false)
FEW(linear_64, 2, 8, false, false)
FEW(gated_8, 2, 1, true, false)
FEW(gated_16, 2, 2, true, false)
FEW(gated_32, 2, 4, true, false)
FEW(gated_64, 2, 8, true, false)
FEW(expert_linear_8, 1, 1, false, true)
FEW(expert_linear_16, 1, 2, false, true)
FEW(expert_linear_32, 1, 4, false, true)
FEW(expert_gated_8, 2, 1, true, true)
FEW(expert_gated_16, 2, 2, true, true)
FEW(expert_gated_32, 2, 4, true, true)
