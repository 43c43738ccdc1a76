// Attention of a decode step: one token in each run, against all keys of its sequence. The equation
// is that of attention.cu, whose append_kv has written the token's own key and value.
//
// attention_step_16, _32  parts of the keys, read once for all query heads that share them
// attention_step_merge    joins the parts
//
// Layout: qkv (tokens, (heads + 2 kv_heads) HEAD_DIM) f32, columns [q | k | v], token t that of run
// t; the cache (slots, kv_heads, context, HEAD_DIM) bf16, keys and values apart; parts (tokens,
// heads, splits, HEAD_DIM + 2): sums, maximum, sum of powers; out (tokens, heads HEAD_DIM) f32.
// Threads: a block of 4 warps per run, ROWS query heads of a key head, and part. The length of the
// part follows from that of the sequence, so that a launch does not depend on it; blocks beyond the
// keys end at once. Tiles of 64 keys and values arrive while those before are used; a warp takes 16
// rows and its share of the tile's keys, with a softmax of its own; the warps are joined at the end.
// Constraints: bf16, HEAD_DIM a multiple of 16, at most 128; shared memory of 2 stages.

#if BF16 && HEAD_DIM % 16 == 0 && HEAD_DIM <= 128

#define TILE 64
#define PITCH (HEAD_DIM + 8)  // rows 16 bytes apart in the banks: ldmatrix does not collide
#define UNIT 1.4426950408889634f

struct StepArgs {
    const float* qkv;
    const bf16 *keys, *values;
    float *out, *parts;
    const Run* runs;
    u32 heads, kv_heads, context, splits;
    float scale;
};

struct Stage {
    bf16 keys[TILE][PITCH], values[TILE][PITCH];
};

// What the warps leave to be joined, in the place of the stages.
struct Joined {
    float sums[4][16][HEAD_DIM], largest[4][16], powers[4][16];
};

// Keys of a part: whole tiles, so many that there are `splits` of them at most.
__device__ __forceinline__ u32 part_keys(u32 seen, u32 splits) {
    return ((seen + splits - 1) / splits + TILE - 1) / TILE * TILE;
}

__device__ __forceinline__ void fetch(Stage& to, const bf16* keys, const bf16* values, u32 first,
                                      u32 end) {
    for (u32 i = threadIdx.x; i < TILE * HEAD_DIM / 8; i += 128) {
        const u32 j = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
        const bool valid = first + j < end;
        const u64 at = valid ? (u64)(first + j) * HEAD_DIM + d : 0;
        copy_async_16(&to.keys[j][d], keys + at, valid);
        copy_async_16(&to.values[j][d], values + at, valid);
    }
    copy_commit();
}

// TILES: of 16 rows each.
template <int TILES>
__device__ __forceinline__ void attention_step(const StepArgs& a) {
    constexpr int SHARES = 4 / TILES;        // warps that share a tile of rows
    constexpr int KEYS = TILE / SHARES;      // of a tile, for each of them
    extern __shared__ __align__(16) unsigned char memory[];
    Stage* stages = (Stage*)memory;
    let_next_begin();
    await_inputs();
    const u32 t = blockIdx.x, group = a.heads / a.kv_heads;
    const u32 row_blocks = (group + 16 * TILES - 1) / (16 * TILES);
    const u32 kv_head = blockIdx.y / row_blocks, split = blockIdx.z;
    const Run run = a.runs[t];
    const u32 seen = run.position + 1, part = part_keys(seen, a.splits);
    const u32 from = split * part;
    if (from >= seen) return;
    const u32 to = min(from + part, seen);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 share = warp / TILES, first = blockIdx.y % row_blocks * 16 * TILES;
    // Rows of this thread in a fragment: low, and low + 8.
    const u32 low = first + warp % TILES * 16 + lane / 4;

    const u64 base = ((u64)run.slot * a.kv_heads + kv_head) * a.context * HEAD_DIM;
    const bf16 *keys = a.keys + base, *values = a.values + base;
    fetch(stages[0], keys, values, from, to);

    u32 q[HEAD_DIM / 16][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const u32 row = low + k % 2 * 8;
        const float* x = a.qkv + (u64)t * (a.heads + 2 * a.kv_heads) * HEAD_DIM +
                         (u64)(kv_head * group + row) * HEAD_DIM + k / 2 * 8 + lane % 4 * 2;
        const float scale = a.scale * UNIT;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            const float2 v = row < group ? *(const float2*)(x + d * 16) : make_float2(0, 0);
            q[d][k] = pack_bf16(v.x * scale, v.y * scale);
        }
    }

    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0, 0};
    float acc[HEAD_DIM / 8][4] = {};
    u32 stage = 0;
    for (u32 key = from; key < to; key += TILE, stage ^= 1) {
        if (key + TILE < to) fetch(stages[stage ^ 1], keys, values, key + TILE, to);
        else copy_commit();
        copy_wait<1>();
        __syncthreads();
        const Stage& s = stages[stage];
        const u32 own = share * KEYS;  // first key of this warp in the tile

        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                u32 b[4];
                load_matrices(b, &s.keys[own + n * 16 + lane % 8 + lane / 16 * 8]
                                        [d * 16 + lane / 8 % 2 * 8]);
                mma_bf16(scores[2 * n], q[d], b[0], b[1]);
                mma_bf16(scores[2 * n + 1], q[d], b[2], b[3]);
            }
        }
        if (key + TILE > to) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 at = key + own + n * 8 + lane % 4 * 2 + i % 2;
                    if (at >= to) scores[n][i] = -INFINITY_F;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = m[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                largest = fmaxf(largest, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
            // A warp that has seen no key yet keeps m at -inf, and no sums to scale.
            const float shift = largest == -INFINITY_F ? 0.0f : largest;
            const float keep = exp2_approx(m[half] - shift);
            m[half] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    scores[n][i] = exp2_approx(scores[n][i] - shift);
                    sum += scores[n][i];
                }
            }
            l[half] = l[half] * keep + sum;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; ++d) {
                acc[d][half * 2] *= keep, acc[d][half * 2 + 1] *= keep;
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            // The scores of 16 keys are the left operand as they are.
            const u32 p[4] = {pack_bf16(scores[2 * n][0], scores[2 * n][1]),
                              pack_bf16(scores[2 * n][2], scores[2 * n][3]),
                              pack_bf16(scores[2 * n + 1][0], scores[2 * n + 1][1]),
                              pack_bf16(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d) {
                u32 b[4];
                load_matrices_transposed(
                    b, &s.values[own + n * 16 + lane % 16][d * 16 + lane / 16 * 8]);
                mma_bf16(acc[2 * d], p, b[0], b[1]);
                mma_bf16(acc[2 * d + 1], p, b[2], b[3]);
            }
        }
        // The next round refills this stage.
        __syncthreads();
    }

    Joined& joined = *(Joined*)memory;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 row = lane / 4 + half * 8;
        float sum = l[half] + __shfl_xor_sync(FULL, l[half], 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        if (lane % 4 == 0) joined.largest[warp][row] = m[half], joined.powers[warp][row] = sum;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) {
            *(float2*)&joined.sums[warp][row][d * 8 + lane % 4 * 2] =
                make_float2(acc[d][half * 2], acc[d][half * 2 + 1]);
        }
    }
    __syncthreads();
    const bool is_whole = part >= seen;
    for (u32 k = threadIdx.x; k < TILES * 16 * HEAD_DIM; k += 128) {
        const u32 row = k / HEAD_DIM, d = k % HEAD_DIM, tile = row / 16;
        if (first + row >= group) break;
        float largest = -INFINITY_F, sum = 0.0f, powers = 0.0f;
#pragma unroll
        for (int w = 0; w < SHARES; ++w) {
            largest = fmaxf(largest, joined.largest[w * TILES + tile][row % 16]);
        }
#pragma unroll
        for (int w = 0; w < SHARES; ++w) {
            const u32 of = w * TILES + tile;
            const float weight = exp2_approx(joined.largest[of][row % 16] - largest);
            sum += weight * joined.sums[of][row % 16][d];
            powers += weight * joined.powers[of][row % 16];
        }
        const u64 at = (u64)t * a.heads + kv_head * group + first + row;
        if (is_whole) {
            a.out[at * HEAD_DIM + d] = sum / powers;
            continue;
        }
        float* to = a.parts + (at * a.splits + split) * (HEAD_DIM + 2);
        to[d] = sum;
        if (d == 0) to[HEAD_DIM] = largest, to[HEAD_DIM + 1] = powers;
    }
}

extern "C" __global__ void __launch_bounds__(128) attention_step_16(const StepArgs a) {
    attention_step<1>(a);
}
extern "C" __global__ void __launch_bounds__(128) attention_step_32(const StepArgs a) {
    attention_step<2>(a);
}

// A block per token and head; a thread per part for the weights, then per column for the sums.
// At most 128 parts.
extern "C" __global__ void __launch_bounds__(128) attention_step_merge(const StepArgs a) {
    __shared__ float weights[128], warps[4];
    let_next_begin();
    await_inputs();
    const u64 row = (u64)blockIdx.x * a.heads + blockIdx.y;
    const u32 seen = a.runs[blockIdx.x].position + 1, part = part_keys(seen, a.splits);
    const u32 count = (seen + part - 1) / part;
    if (count == 1) return;
    const float* parts = a.parts + row * a.splits * (HEAD_DIM + 2);
    const u32 i = threadIdx.x;
    const float m = i < count ? parts[i * (HEAD_DIM + 2) + HEAD_DIM] : -INFINITY_F;
    const float l = i < count ? parts[i * (HEAD_DIM + 2) + HEAD_DIM + 1] : 0.0f;
    float largest = warp_max(m);
    if (i % 32 == 0) warps[i / 32] = largest;
    __syncthreads();
    largest = fmaxf(fmaxf(warps[0], warps[1]), fmaxf(warps[2], warps[3]));
    weights[i] = exp2_approx(m - largest);
    __syncthreads();
    float sum = warp_sum(weights[i] * l);
    if (i % 32 == 0) warps[i / 32] = sum;
    __syncthreads();
    sum = warps[0] + warps[1] + warps[2] + warps[3];
    for (u32 d = i; d < HEAD_DIM; d += 128) {
        float acc = 0.0f;
#pragma unroll 8
        for (u32 k = 0; k < count; ++k) acc += weights[k] * parts[k * (HEAD_DIM + 2) + d];
        a.out[row * HEAD_DIM + d] = acc / sum;
    }
}
#endif
