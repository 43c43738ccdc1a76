// Products of many rows on the tensor cores of sm_90a: groups of rows of x, one after the other,
// each times a matrix of its own. The rows are those of a prompt, and all one group; or its
// (token, expert) entries, sorted by expert (moe.cu).
//
//   grouped_swiglu   out[i] = silu(x[i] W_gate[e]^T) * (x[i] W_up[e]^T)
//   grouped          out[i] = p[i] (x[i] W[e]^T)
//
// Layout: x (rows, k) bf16, by a map of boxes of (128, 64); w (experts n, k) bf16, or
// (experts 2 n, k) with rows [gate; up] per expert, by the same; out (rows, n) bf16, contiguous.
// Threads: as many blocks as the card has multiprocessors, in pairs that share rows of W. A pair
// takes tiles of 2 BLOCK_M rows of one group by BLOCK_N rows of W in turn. One thread of a block
// keeps STAGES of both operands on their way; two groups of four warps multiply, 64 rows each,
// which they leave out where the rows of the group end. Gate and up of a column are sums of one
// thread.
// Constraints: n a multiple of 8, the addresses and strides of x and w of 16 bytes.

#define BLOCK_M 128
#define BLOCK_N 256
#define DEPTH 64
#define STAGES 4
// Row tiles of pairs that are done before the next rows of W: what a wave of blocks reads stays in
// the L2.
#define ALONG 8

struct GroupedArgs {
    TensorMap x, w;
    const u32* start;   // (experts + 1): first row of each group; or null, where there is one
    const u32* sorted;  // (rows): where the weight of a row is; or null
    const float* p;
    bf16* out;
    u32 rows, experts, n, k;
};

struct Stage {
    bf16 x[BLOCK_M][DEPTH], w[BLOCK_N][DEPTH];
};

struct GroupedShared {
    Stage stages[STAGES];
    bf16 out[2][64][128];
    u64 full[STAGES], empty[STAGES];
};

struct Tile {
    u32 expert, first, last, column;  // first >= last: no rows
};

// Tile `index` of a pair of blocks, for the one of this rank; false after the last.
template <bool SWIGLU>
__device__ __forceinline__ bool tile_at(const GroupedArgs& a, u32 index, u32 rank, Tile& tile) {
    constexpr u32 COLS = SWIGLU ? BLOCK_N / 2 : BLOCK_N;
    const u32 across = (a.n + COLS - 1) / COLS;
    for (u32 e = 0; e < a.experts; ++e) {
        const u32 start = a.start ? a.start[e] : 0, end = a.start ? a.start[e + 1] : a.rows;
        const u32 down = (end - start + 2 * BLOCK_M - 1) / (2 * BLOCK_M);
        if (index < down * across) {
            const u32 band = index / (ALONG * across) * ALONG, rest = index % (ALONG * across);
            const u32 height = min(down - band, (u32)ALONG);
            const u32 first = start + (2 * (band + rest % height) + rank) * BLOCK_M;
            tile = Tile{e, first, min(first + BLOCK_M, end), rest / height * COLS};
            return true;
        }
        index -= down * across;
    }
    return false;
}

__device__ __forceinline__ float silu_fast(float v) {
    return __fdividef(v, 1.0f + exp2_approx(-1.4426950408889634f * v));
}

// Where the 16 bytes of a chunk of a row of results are: in other banks than those of the rows
// around it.
__device__ __forceinline__ u32 chunk_at(u32 row, u32 chunk) { return (chunk ^ (row & 7)) * 8; }

template <bool SWIGLU>
__device__ __forceinline__ void grouped_products(const GroupedArgs& a) {
    extern __shared__ unsigned char memory[];
    GroupedShared& s = *(GroupedShared*)(((u64)memory + 1023) & ~1023ull);
    const u32 rank = cluster_rank(), pairs = gridDim.x / 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], 4);
        barrier_init_done();
    }
    cluster_sync();
    const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Tile tile;
    u32 index = blockIdx.x / 2, round = 0;  // how many stages were used before
    if (group == 0) {
        fewer_registers<40>();
        for (; threadIdx.x == 0 && tile_at<SWIGLU>(a, index, rank, tile); index += pairs) {
            const u32 row = (SWIGLU ? 2 : 1) * tile.expert * a.n + tile.column;
            const u32 second = row + (SWIGLU ? a.n : BLOCK_N / 2);
            for (u32 k = 0; k < a.k; k += DEPTH, ++round) {
                const u32 i = round % STAGES;
                u64* full = &s.full[i];
                Stage& stage = s.stages[i];
                // Both blocks are done with the stage: each fetches one half of W for both.
                if (round >= STAGES) barrier_wait(&s.empty[i], (round / STAGES - 1) % 2);
                barrier_expect(full, sizeof(Stage));
                copy_box(stage.x, a.x, k, tile.first, full);
                copy_box_to(3, stage.w[rank * (BLOCK_N / 2)], a.w, k, rank ? second : row, full);
            }
        }
        __syncwarp();
        // The other block may still copy to this one, and arrive at its barriers.
        cluster_sync();
        return;
    }
    more_registers<232>();
    const u32 own = group - 1;
    bool more = tile_at<SWIGLU>(a, index, rank, tile);
    while (more) {
        const Tile now = tile;
        const u32 at = now.first + own * 64;
        const bool idle = at >= now.last;
        float c[128];
        for (u32 k = 0; k < a.k; k += DEPTH, ++round) {
            const u32 i = round % STAGES;
            barrier_wait(&s.full[i], round / STAGES % 2);
            if (!idle) {
                const u64 x = operand(s.stages[i].x[own * 64]), w = operand(s.stages[i].w);
                products_begin();
#pragma unroll
                for (int d = 0; d < DEPTH / 16; ++d) {
                    product_64_256(c, x + 2 * d, w + 2 * d, k + d > 0);
                }
                products_commit();
                // The products of the stage before are done: it may be filled again.
                products_wait<1>();
            }
            if (k > 0 && threadIdx.x % 128 < 2) {
                barrier_arrive_at(&s.empty[(round - 1) % STAGES], threadIdx.x % 128);
            }
        }
        // While the last products are on their way.
        index += pairs;
        more = tile_at<SWIGLU>(a, index, rank, tile);
        products_wait<0>();
        if (threadIdx.x % 128 < 2) {
            barrier_arrive_at(&s.empty[(round - 1) % STAGES], threadIdx.x % 128);
        }
        if (idle) continue;

        const u32 row = warp * 16 + lane / 4;
        float scale[2] = {1.0f, 1.0f};
        if (!SWIGLU && a.sorted) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 i = at + row + half * 8;
                if (i < now.last) scale[half] = a.p[a.sorted[i]];
            }
        }
#pragma unroll
        for (int part = 0; part < (SWIGLU ? 1 : 2); ++part) {
            bf16(*out)[128] = s.out[own];
#pragma unroll
            for (int b = 0; b < 16; ++b) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float v[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int at = 4 * (part * 16 + b) + 2 * half + j;
                        v[j] = SWIGLU ? silu_fast(c[at]) * c[(at + 64) % 128] : c[at] * scale[half];
                    }
                    const u32 r = row + half * 8;
                    *(u32*)&out[r][chunk_at(r, b) + lane % 4 * 2] = pack_bf16(v[0], v[1]);
                }
            }
            group_sync(1 + own, 128);
            for (u32 e = threadIdx.x % 128; e < 64 * 16; e += 128) {
                const u32 r = e / 16, column = now.column + part * 128 + e % 16 * 8;
                if (at + r < now.last && column < a.n) {
                    *(uint4*)(a.out + (u64)(at + r) * a.n + column) =
                        *(const uint4*)&out[r][chunk_at(r, e % 16)];
                }
            }
            group_sync(1 + own, 128);
        }
    }
    cluster_sync();
}

#define GROUPED(NAME, SWIGLU)                                                      \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) \
        NAME(const __grid_constant__ GroupedArgs a) {                              \
        grouped_products<SWIGLU>(a);                                               \
    }
GROUPED(grouped_swiglu, true)
GROUPED(grouped, false)
