// The products of moe.cu for many tokens: each expert's weights times the rows of its entries.
//
//   moe_gate_up_TILE   act[i] = silu(W_gate[e] x[token]) * W_up[e] x[token]
//   moe_down_TILE      y[i]   = W_down[e] act[i]            i: sorted entry of expert e
//
// Layout: x (tokens, ldx) and act (entries, inter padded) element_t, W weight_t with stride ldw;
// y (entries, hidden) f32. element_t is bf16 or f32 as the weights; both strides are multiples of
// 16 bytes with zeros beyond the columns in use.
// Threads: a block per TILE sorted entries of one expert (along x: all tiles that there may be,
// of which the last may be of no expert) and COLS rows of W (along y).
//   bf16: 8 warps, mma on tiles of 32 columns of K, three stages of cp.async
//   f32:  256 threads with 4 x 4 sums each, tiles of 16 columns of K
// A block of gate_up has COLS / 2 gate rows and the COLS / 2 up rows that go with them; they are
// laid so that a thread has the sums of both.

#if BF16
typedef bf16 element_t;
#else
typedef float element_t;
#endif

struct TilesArgs {
    const element_t* x;
    const weight_t* w;
    const u32* start;   // (experts + 1)
    const u32* sorted;  // (entries)
    element_t* act;     // gate_up: result
    float* y;           // down: result
    u32 experts, top_k;
    u32 n, k;           // gate_up: inter, hidden; down: hidden, inter
    u32 ldx, ldw, ldact;
};

struct Tile {
    u32 expert, first, last;  // sorted entries
};

// The expert and entries of tile `index`, first == last if there is none.
template <int TILE>
__device__ __forceinline__ Tile find_tile(const TilesArgs& a, u32 index) {
    for (u32 e = 0; e < a.experts; ++e) {
        const u32 start = a.start[e], end = a.start[e + 1], tiles = (end - start + TILE - 1) / TILE;
        if (index < tiles) {
            const u32 first = start + index * TILE;
            return Tile{e, first, min(first + TILE, end)};
        }
        index -= tiles;
    }
    return Tile{0, 0, 0};
}

// Row of W that is row r of the tile, or -1. In gate_up, of every GROUP rows the first half are
// gate and the second the up of the same columns.
template <bool GATE_UP, int COLS, int GROUP>
__device__ __forceinline__ long long weight_row(const TilesArgs& a, u32 expert, u32 r) {
    if (GATE_UP) {
        const u32 part = r % GROUP, half = GROUP / 2;
        const u32 j = blockIdx.y * (COLS / 2) + r / GROUP * half + part % half;
        if (j >= a.n) return -1;
        return (long long)expert * 2 * a.n + (part < half ? 0 : a.n) + j;
    }
    const u32 j = blockIdx.y * COLS + r;
    return j < a.n ? (long long)expert * a.n + j : -1;
}

#if BF16

#define COLS 128
#define DEPTH 32
#define STAGES 3
#define PITCH (DEPTH + 8)  // 80 bytes: eight rows of 16 bytes fall into different banks

template <int TILE>
struct Stage {
    bf16 x[TILE][PITCH], w[COLS][PITCH];
};

template <bool GATE_UP, int TILE>
__device__ __forceinline__ void product(const TilesArgs& a) {
    constexpr int DOWN_WARPS = TILE / 32, ACROSS = 8 / DOWN_WARPS, OWN = COLS / ACROSS;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ const bf16* rows[TILE];
    Stage<TILE>* stages = (Stage<TILE>*)memory;
    const Tile tile = find_tile<TILE>(a, blockIdx.x);
    if (tile.first == tile.last) return;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 r = threadIdx.x; r < TILE; r += 256) {
        const u32 i = tile.first + r;
        const u64 row = i >= tile.last ? 0 : GATE_UP ? a.sorted[i] / a.top_k : i;
        rows[r] = i < tile.last ? a.x + row * a.ldx : nullptr;
    }
    // A thread copies 8 columns of row threadIdx.x / 4 of W, and of the row 64 below.
    const u32 column = threadIdx.x % 4 * 8;
    const bf16* w[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const long long row =
            weight_row<GATE_UP, COLS, OWN>(a, tile.expert, threadIdx.x / 4 + i * 64);
        w[i] = row < 0 ? nullptr : a.w + (u64)row * a.ldw + column;
    }
    __syncthreads();

    auto fetch = [&](u32 k) {
        Stage<TILE>& stage = stages[k / DEPTH % STAGES];
        for (u32 r = threadIdx.x / 4; r < TILE; r += 64) {
            const bf16* row = rows[r];
            const bool valid = row && k + column < a.k;
            copy_async_16(&stage.x[r][column], valid ? row + k + column : a.x, valid);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool valid = w[i] && k + column < a.k;
            copy_async_16(&stage.w[threadIdx.x / 4 + i * 64][column], valid ? w[i] + k : a.w, valid);
        }
    };
    const u32 down = warp % DOWN_WARPS * 32, across = warp / DOWN_WARPS * OWN;
    float acc[2][OWN / 8][4] = {};
#pragma unroll
    for (u32 s = 0; s < STAGES - 1; ++s) {
        if (s * DEPTH < a.k) fetch(s * DEPTH);
        copy_commit();
    }
    for (u32 k = 0; k < a.k; k += DEPTH) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        // Into the stage that all warps were done with before the barrier.
        if (k + (STAGES - 1) * DEPTH < a.k) fetch(k + (STAGES - 1) * DEPTH);
        copy_commit();
        const Stage<TILE>& stage = stages[k / DEPTH % STAGES];
#pragma unroll
        for (int d = 0; d < DEPTH; d += 16) {
            u32 left[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                load_matrices(left[m], &stage.x[down + m * 16 + lane % 16][d + lane / 16 * 8]);
            }
#pragma unroll
            for (int n = 0; n < OWN / 16; ++n) {
                u32 b[4];
                load_matrices(b, &stage.w[across + n * 16 + lane % 8 + lane / 16 * 8]
                                         [d + lane / 8 % 2 * 8]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma_bf16(acc[m][2 * n], left[m], b[0], b[1]);
                    mma_bf16(acc[m][2 * n + 1], left[m], b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 i = tile.first + down + m * 16 + lane / 4 + half * 8;
            if (i >= tile.last) continue;
#pragma unroll
            for (int n = 0; n < (GATE_UP ? OWN / 16 : OWN / 8); ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const u32 inner = n * 8 + lane % 4 * 2 + c;
                    const float sum = acc[m][n][half * 2 + c];
                    if (GATE_UP) {
                        const u32 j = blockIdx.y * (COLS / 2) + across / 2 + inner;
                        const float up = acc[m][(n + OWN / 16) % (OWN / 8)][half * 2 + c];
                        if (j < a.ldact) {
                            a.act[(u64)i * a.ldact + j] = to_bf16(j < a.n ? silu(sum) * up : 0.0f);
                        }
                    } else {
                        const u32 j = blockIdx.y * COLS + across + inner;
                        if (j < a.n) a.y[(u64)i * a.n + j] = sum;
                    }
                }
            }
        }
    }
}

#define PRODUCT(NAME, GATE_UP, TILE) \
    extern "C" __global__ void __launch_bounds__(256) NAME(const TilesArgs a) { \
        product<GATE_UP, TILE>(a);                                              \
    }
PRODUCT(moe_gate_up_128, true, 128)
PRODUCT(moe_gate_up_32, true, 32)
PRODUCT(moe_down_128, false, 128)
PRODUCT(moe_down_32, false, 32)

#else

#define TILE 64
#define COLS 64
#define DEPTH 16

template <bool GATE_UP>
__device__ __forceinline__ void product(const TilesArgs& a) {
    __shared__ float left[DEPTH][TILE + 1], right[DEPTH][COLS + 1];
    const Tile tile = find_tile<TILE>(a, blockIdx.x);
    if (tile.first == tile.last) return;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float acc[4][4] = {};
    for (u32 k = 0; k < a.k; k += DEPTH) {
        for (u32 e = threadIdx.x; e < TILE * DEPTH; e += 256) {
            const u32 r = e / DEPTH, d = e % DEPTH, i = tile.first + r;
            const bool within = k + d < a.k;
            const u64 row = i >= tile.last ? 0 : GATE_UP ? a.sorted[i] / a.top_k : i;
            left[d][r] = i < tile.last && within ? a.x[row * a.ldx + k + d] : 0.0f;
            const long long w = weight_row<GATE_UP, COLS, COLS>(a, tile.expert, r);
            right[d][r] = w >= 0 && within ? a.w[(u64)w * a.ldw + k + d] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
            for (int m = 0; m < 4; ++m) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    acc[m][n] += left[d][ty * 4 + m] * right[d][tx + 16 * n];
                }
            }
        }
        __syncthreads();
    }
    // Columns tx, tx + 16 are gate where tx + 32, tx + 48 are their up.
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        const u32 i = tile.first + ty * 4 + m;
        if (i >= tile.last) continue;
#pragma unroll
        for (int n = 0; n < (GATE_UP ? 2 : 4); ++n) {
            const u32 j = blockIdx.y * (GATE_UP ? COLS / 2 : COLS) + tx + 16 * n;
            if (j >= a.n) continue;
            if (GATE_UP) a.act[(u64)i * a.ldact + j] = silu(acc[m][n]) * acc[m][(n + 2) % 4];
            else a.y[(u64)i * a.n + j] = acc[m][n];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) moe_gate_up_64(const TilesArgs a) {
    product<true>(a);
}
extern "C" __global__ void __launch_bounds__(256) moe_down_64(const TilesArgs a) {
    product<false>(a);
}
#endif
