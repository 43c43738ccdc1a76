// Products of few rows of x with a matrix on the tensor cores of sm_90a: each weight is read once for
// up to 64 of them, by the copy engine, and dequantised on its way from shared memory to the tensor
// cores.
// few.cu is for other cards, and for experts of widths that are no multiple of 8.
//
//   linear_*         out = x W^T + bias
//   gated_*          out = silu(x W_gate^T) * (x W_up^T), W = [W_gate; W_up]
//   expert_linear_*  out = x W[e]^T for the sorted entries of expert e, which x has a row for
//   expert_gated_*   the same of gate and up
//
// *_8 to *_64 take so many rows of x a tile.
//
// Layout: x (rows, k) bf16, by a map of boxes of (tile, 64); W of n rows (gated: 2 n) for each
// expert as PACKING of few.cu says, by a map of its bytes in boxes of (64, 128), its scales
// `scale_stride` bytes apart; bias f32; out (rows, ldo) of f32, of gated_* of bf16, with zeros
// beyond n.
// Weights in blocks are scaled before the product, and rounded to bf16; those of rows after it.
// Threads: a block takes 128 rows of W at a time (gated: 64 and the 64 that go with them). One
// thread keeps STAGES of both operands on their way, those of W already before the kernels before
// this one have ended. Pairs of groups of four warps take them in turn, W as the left operand, from
// registers, x as the right one: rows of x are columns of the result. Gate and up of a column are
// sums of one thread. Where there are too few tiles for the card, `splits` blocks of a cluster share
// k. The sums of pairs and blocks are added in their order.
// Experts: tiles are found among the sorted entries, see moe.cu; splits = 1.
// Constraints: addresses and strides of x and W of 16 bytes; with splits > 1 a block has one tile.

#define IN_BLOCKS (PACKING >= 2)
#define BYTES (PACKING == 0 ? 256 : 128)  // of a row of W in a stage
#define DEPTH (PACKING == 3 ? 256 : 128)  // columns of them
#define HALVES (DEPTH / 64)               // boxes of x in a stage; what is multiplied at a time
#define PAIR 256  // threads of two groups of four warps, which share a stage
// Where nothing is dequantised one pair keeps up, and makes room for stages. Launchers count with
// them too, ops/few_groups.rs.
#define PAIRS_FOR(EXPERTS) (PACKING == 0 && !EXPERTS ? 1 : 2)

struct FewGroupsArgs {
    TensorMap x, w;
    const unsigned char* scales;
    const float* bias;  // or null
    void* out;
    const u32* start;  // (experts + 1): of the sorted entries
    u32 rows, n, k;
    u32 ldo;  // elements
    u32 scale_stride;
    u32 experts, splits;
};

struct Tile {
    u32 expert, first, last;  // rows of x
    u32 column;               // of the result
};

// Tile `index`; false after the last. Tiles of the same rows of W follow each other.
template <int COLUMNS, bool GATED, bool EXPERTS>
__device__ __forceinline__ bool tile_at(const FewGroupsArgs& a, u32 index, Tile& tile) {
    constexpr u32 ROWS = GATED ? 64 : 128;
    const u32 across = (max(a.n, GATED ? a.ldo : 0) + ROWS - 1) / ROWS;
    auto along_x = [](u32 rows) { return (rows + COLUMNS - 1) / COLUMNS; };
    if constexpr (EXPERTS) {
        for (u32 e = 0; e < a.experts; ++e) {
            const u32 start = a.start[e], end = a.start[e + 1];
            const u32 along = along_x(end - start);
            if (index < along * across) {
                const u32 first = start + index % along * COLUMNS;
                tile = Tile{e, first, min(first + COLUMNS, end), index / along * ROWS};
                return true;
            }
            index -= along * across;
        }
        return false;
    } else {
        const u32 along = along_x(a.rows), first = index % along * COLUMNS;
        tile = Tile{0, first, min(first + COLUMNS, a.rows), index / along * ROWS};
        return index < along * across;
    }
}

// Two weights from two bytes; of PACKING 3, from their lower or upper halves.
__device__ __forceinline__ u32 unpack(u32 v, bool upper, u32 scale) {
#if PACKING == 3
    const u32 q = widen_int4((upper ? v >> 4 : v) & 0x0f0fu, false);
#else
    const u32 q = widen_int8(v, false);
#endif
    return IN_BLOCKS ? scale_bf16(q, scale) : q;
}

__device__ __forceinline__ u32 load_shared_16(u32 address) {
    bf16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

// From the upper row of a lane to its lower one in a stage.
#define DOWN(GATED) ((GATED ? 64 : 8) * 128)

// Where a lane finds its part of W in a stage: for PACKING 0 it names a row of a matrix of 8 rows
// by 8 columns, else it is its own upper row.
template <bool GATED>
__device__ __forceinline__ u32 part_of_stage(u32 first_row) {
    const u32 lane = threadIdx.x % 32;
#if PACKING == 0
    // Of four matrices: upper and lower rows of the first 8 columns, then of the next.
    return (first_row + lane % 8) * 128 + lane / 8 % 2 * DOWN(GATED) + (lane / 16 ^ lane % 8) * 16;
#else
    return (first_row + lane / 4) * 128 + lane / 4 * 16 + lane % 4 * 2;
#endif
}

// The weights of 64 columns as left operands of 16 columns each. `half` counts them in a stage, and
// `part` is where the lane's are. Chunks of 16 bytes lie where the copy engine's swizzle puts them.
template <bool GATED>
__device__ __forceinline__ void load_weights(u32 part, int half, const u32 (&scales)[2],
                                             u32 (&to)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if PACKING == 0
        load_matrices(to[i], (part ^ 32 * i) + half * (128 * 128));
#else
        const u32 at = part ^ 16 * (PACKING == 3 ? 2 * half + i / 2 : 4 * half + i);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u32 scale = __byte_perm(scales[r], 0, i < 2 ? 0x1010 : 0x3232);
            to[i][r] = unpack(load_shared_16(at + r * DOWN(GATED)), i % 2, scale);
            to[i][2 + r] = unpack(load_shared_16(at + r * DOWN(GATED) + 8), i % 2, scale);
        }
#endif
    }
}

// What a block does with its tiles.
template <int COLUMNS, bool GATED, bool EXPERTS>
struct Few {
    // A stage has boxes of W (BYTES / 128, 2, 64, 128), then of x (HALVES, COLUMNS, 64).
    static constexpr int X_AT = BYTES * 128, X_BYTES = COLUMNS * 128;
    static constexpr int STAGE_BYTES = X_AT + HALVES * X_BYTES;
    static constexpr u32 PAIRS = PAIRS_FOR(EXPERTS), CONSUMERS = PAIRS * PAIR;
    static constexpr int SUMS = COLUMNS / 2, SUM_BYTES = SUMS * PAIR * 4;
    // A stage is always of the same pair, which then sees each phase of its barrier.
    static constexpr int STAGES =
        (SHARED - (PAIRS - 1) * SUM_BYTES) / STAGE_BYTES / PAIRS * PAIRS;
    static_assert(STAGES > PAIRS, "too little shared memory");
    static_assert(STAGE_BYTES * STAGES >= PAIRS * SUM_BYTES, "too little for the sums");

    const FewGroupsArgs& a;
    u32 stages, sums, full, empty;  // in shared memory
    u32 from, to;                    // of the steps along k

    __device__ __forceinline__ void fetch_w(const Tile& tile, u32 step, u32 i) {
        const u32 first = tile.expert * (GATED ? 2 * a.n : a.n) + tile.column;
        const u32 second = first + (GATED ? a.n : 64);
        const u32 stage = stages + i * STAGE_BYTES, barrier = full + 8 * i;
        barrier_expect(barrier, STAGE_BYTES);
#pragma unroll
        for (int b = 0; b < BYTES / 128; ++b) {
            const u32 column = step * BYTES + b * 128, to = stage + b * (128 * 128);
            copy_box(to, a.w, column, first, barrier);
            copy_box(to + 64 * 128, a.w, column, second, barrier);
        }
    }
    __device__ __forceinline__ void fetch_x(const Tile& tile, u32 step, u32 i) {
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
            copy_box(stages + i * STAGE_BYTES + X_AT + h * X_BYTES, a.x, step * DEPTH + h * 64,
                     tile.first, full + 8 * i);
        }
    }

    // Asks for the first weights, which no kernel writes: they may come before the inputs. Says for
    // how many stages. This and `fetch` by one thread.
    __device__ __forceinline__ u32 fetch_ahead(u32 index) {
        Tile tile;
        if (EXPERTS || !tile_at<COLUMNS, GATED, EXPERTS>(a, index, tile)) return 0;
        const u32 ahead = min((u32)STAGES, to - from);
        for (u32 i = 0; i < ahead; ++i) fetch_w(tile, from + i, i);
        return ahead;
    }

    __device__ __forceinline__ void fetch(u32 index, u32 stride, u32 ahead) {
        await_inputs();
        Tile tile;
        for (u32 round = 0; tile_at<COLUMNS, GATED, EXPERTS>(a, index, tile); index += stride) {
            for (u32 step = from; step < to; ++step, ++round) {
                const u32 i = round % STAGES;
                if (round >= STAGES) barrier_wait(empty + 8 * i, (round / STAGES - 1) % 2);
                if (round >= ahead) fetch_w(tile, step, i);
                fetch_x(tile, step, i);
            }
        }
    }

    // Scales of the blocks of a step in a row of W.
    __device__ __forceinline__ void load_scales(const unsigned char* row, u32 step,
                                                u32 (&to)[HALVES]) {
        const u32 at = step * (DEPTH / 16);
        const bool valid = IN_BLOCKS && at < a.scale_stride;
#pragma unroll
        for (int h = 0; h < HALVES; h += 2) {
            const uint2 v = valid ? __ldg((const uint2*)(row + at + 4 * h)) : make_uint2(0, 0);
            to[h] = v.x, to[h + 1] = v.y;
        }
    }

    // Writes columns `column` of the result and, not gated, `column` + 8 for rows `t` and `t` + 1 of
    // a tile, from its sums in the order that hopper.cuh says.
    __device__ __forceinline__ void write(const Tile& tile, u32 column, u32 t,
                                          const float (&sums)[4]) {
        const u64 of_expert = (u64)tile.expert * (GATED ? 2 * a.n : a.n);
        auto row_scale = [&](u64 row) {
            return PACKING == 1 ? *(const float*)(a.scales + row * a.scale_stride) : 1.0f;
        };
        if (GATED) {
            if (column >= a.ldo) return;
            const bool valid = column < a.n;
            const float gate = valid ? row_scale(of_expert + column) : 0.0f;
            const float up = valid ? row_scale(of_expert + a.n + column) : 0.0f;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = tile.first + t + i;
                if (row >= tile.last) continue;
                const float value = valid ? silu(sums[i] * gate) * (sums[2 + i] * up) : 0.0f;
                ((bf16*)a.out)[(u64)row * a.ldo + column] = to_bf16(value);
            }
            return;
        }
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 j = column + 8 * half;
            if (j >= a.n) continue;
            const float scale = row_scale(of_expert + j), bias = a.bias ? a.bias[j] : 0.0f;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = tile.first + t + i;
                if (row >= tile.last) continue;
                ((float*)a.out)[(u64)row * a.ldo + j] = sums[2 * half + i] * scale + bias;
            }
        }
    }

    // By PAIRS times two groups of four warps.
    __device__ __forceinline__ void multiply(u32 index, u32 stride, u32 rank) {
        const u32 pair = threadIdx.x / PAIR, group = threadIdx.x / 128 % 2;
        const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        // Of the rows of a warp, within the two boxes of W.
        const u32 row = GATED ? group * 32 + warp * 8 : group * 64 + warp * 16;
        const u32 part = part_of_stage<GATED>(row), of_thread = threadIdx.x % PAIR * 4;
        await_inputs();
        Tile tile;
        for (u32 round = 0; tile_at<COLUMNS, GATED, EXPERTS>(a, index, tile); index += stride) {
            const u32 column = tile.column + row + lane / 4;
            const u64 of_expert = (u64)tile.expert * (GATED ? 2 * a.n : a.n);
            // Rows beyond the last have the scales of the last, and are not written.
            const unsigned char* scale_rows[2];
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                const u32 j = min(column + (GATED ? 0 : 8 * r), a.n - 1) + (GATED ? r * a.n : 0);
                scale_rows[r] = a.scales + (of_expert + j) * a.scale_stride;
            }
            // The steps of this pair.
            const u32 last = round + to - from;
            u32 mine = round + (round % PAIRS != pair);
            u32 step = from + mine - round;
            u32 scales[2][HALVES], next[2][HALVES];
            load_scales(scale_rows[0], step, next[0]);
            load_scales(scale_rows[1], step, next[1]);
            float c[SUMS] = {};
            u32 w[2][4][4], before = last;
            for (; mine < last; mine += PAIRS, step += PAIRS) {
                const u32 i = mine % STAGES;
#pragma unroll
                for (int h = 0; h < HALVES; ++h) {
                    scales[0][h] = next[0][h], scales[1][h] = next[1][h];
                }
                load_scales(scale_rows[0], step + PAIRS, next[0]);
                load_scales(scale_rows[1], step + PAIRS, next[1]);
                barrier_wait(full + 8 * i, mine / STAGES % 2);
                const u32 stage = stages + i * STAGE_BYTES;
#pragma unroll
                for (int h = 0; h < HALVES; ++h) {
                    const u32 of_half[2] = {scales[0][h], scales[1][h]};
                    load_weights<GATED>(stage + part, h, of_half, w[h % 2]);
                    const u64 x = operand(stage + X_AT + h * X_BYTES);
                    products_begin();
#pragma unroll
                    for (int d = 0; d < 4; ++d) product_rows(c, w[h % 2][d], x + 2 * d);
                    products_commit();
                    // Those before are done: their registers, and at a stage's beginning the stage
                    // before, may be filled again.
                    products_wait<1>();
                    if (h == 0 && before != last && lane == 0) {
                        barrier_arrive(empty + 8 * (before % STAGES));
                    }
                }
                before = mine;
            }
            products_wait<0>();
            if (before != last && lane == 0) barrier_arrive(empty + 8 * (before % STAGES));
            round = last;
            if (a.splits == 1) {
                // Of two pairs each adds its sums to those of the other for every second 8 rows of x.
                if (PAIRS > 1) {
#pragma unroll
                    for (int i = 0; i < SUMS; ++i) {
                        if (i / 4 % PAIRS != pair) {
                            store_shared(sums + 4 * PAIR * i + of_thread, c[i]);
                        }
                    }
                    group_sync(1, CONSUMERS);
                }
#pragma unroll
                for (int i = 0; i < SUMS; i += 4) {
                    if (i / 4 % PAIRS != pair) continue;
                    float all[4] = {c[i], c[i + 1], c[i + 2], c[i + 3]};
#pragma unroll
                    for (int j = 0; j < 4 && PAIRS > 1; ++j) {
                        all[j] += load_shared(sums + 4 * PAIR * (i + j) + of_thread);
                    }
                    write(tile, column, 2 * i + lane % 4 * 2, all);
                }
                if (PAIRS > 1) group_sync(1, CONSUMERS);
                continue;
            }
            // Nothing is on its way to the stages any more.
            group_sync(1, CONSUMERS);
            const u32 own = stages + pair * SUM_BYTES + of_thread;
#pragma unroll
            for (int i = 0; i < SUMS; ++i) store_shared(own + 4 * PAIR * i, c[i]);
            cluster_sync();
            for (u32 i = PAIRS * rank + pair; i < COLUMNS / 8; i += PAIRS * a.splits) {
                float all[4] = {};
                for (u32 other = 0; other < PAIRS * a.splits; ++other) {
                    const u32 from = stages + other % PAIRS * SUM_BYTES + of_thread;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        all[j] += load_shared_at(from + 4 * PAIR * (4 * i + j), other / PAIRS);
                    }
                }
                write(tile, column, 8 * i + lane % 4 * 2, all);
            }
            return;
        }
    }
};

template <int COLUMNS, bool GATED, bool EXPERTS>
__device__ __forceinline__ void few(const FewGroupsArgs& a) {
    using Work = Few<COLUMNS, GATED, EXPERTS>;
    extern __shared__ unsigned char memory[];
    __shared__ u64 full[Work::STAGES], empty[Work::STAGES];
    const u32 rank = a.splits > 1 ? cluster_rank() : 0, steps = (a.k + DEPTH - 1) / DEPTH;
    const u32 stages = (shared_address(memory) + 1023) & ~1023u;
    const u32 sums = stages + Work::STAGES * Work::STAGE_BYTES;
    Work work{a, stages, sums, shared_address(full), shared_address(empty),
              steps * rank / a.splits, steps * (rank + 1) / a.splits};
    const u32 index = blockIdx.x / a.splits, stride = gridDim.x / a.splits;
    u32 ahead = 0;
    const bool fetches = threadIdx.x == Work::CONSUMERS;
    if (fetches) {
        for (int i = 0; i < Work::STAGES; ++i) {
            barrier_init(&full[i], 1), barrier_init(&empty[i], PAIR / 32);
        }
        barrier_init_done();
        ahead = work.fetch_ahead(index);
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x >= Work::CONSUMERS) {
        if (fetches) work.fetch(index, stride, ahead);
        __syncwarp();
        if (a.splits > 1) cluster_sync();
    } else {
        work.multiply(index, stride, rank);
    }
    // Others of the cluster may still read the sums of this one.
    if (a.splits > 1) cluster_sync();
}

#define FEW(NAME, COLUMNS, GATED, EXPERTS)                                            \
    extern "C" __global__ void __launch_bounds__(PAIRS_FOR(EXPERTS) * PAIR + 32, 1)   \
        NAME(const __grid_constant__ FewGroupsArgs a) {                               \
        few<COLUMNS, GATED, EXPERTS>(a);                                              \
    }
FEW(linear_8, 8, false, false)
FEW(linear_16, 16, false, false)
FEW(linear_32, 32, false, false)
FEW(linear_64, 64, false, false)
FEW(gated_8, 8, true, false)
FEW(gated_16, 16, true, false)
FEW(gated_32, 32, true, false)
FEW(gated_64, 64, true, false)
FEW(expert_linear_8, 8, false, true)
FEW(expert_linear_16, 16, false, true)
FEW(expert_linear_32, 32, false, true)
FEW(expert_linear_64, 64, false, true)
FEW(expert_gated_8, 8, true, true)
FEW(expert_gated_16, 16, true, true)
FEW(expert_gated_32, 32, true, true)
FEW(expert_gated_64, 64, true, true)
