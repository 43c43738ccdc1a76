// Attention with grouped queries over the KV cache. Per query head h, which reads key and value
// head h / GROUP, at position p:
//
//   out = sum_{s <= p} softmax_s(q . k_s / sqrt(HEAD_DIM)) v_s
//
// append_kv         writes the keys and values of the batch to the cache
// attention_rows    any precision; few queries, or f32: products on the CUDA cores
// attention_merge   joins what attention_rows computed for different parts of the keys
// attention_tiles   bf16: segments of many queries, products on the tensor cores; on sm_90a it is
//                   attention_groups.cu for heads of 64 and 128
//
// Layout: qkv (tokens, (heads + 2 kv_heads) HEAD_DIM) f32, columns [q | k | v]; the cache
// (slots, kv_heads, context, HEAD_DIM) of weight_t, keys and values apart;
// out (tokens, heads HEAD_DIM) f32.
// All softmaxes are online: a running maximum m, the sum l of exp(s - m), and the sum of
// exp(s - m) v, in f32, in units of powers of two (bf16) or of e (f32).

struct AttentionArgs {
    const float* qkv;
    weight_t *keys, *values;
    float* out;
    float* parts;  // (tokens heads, splits, HEAD_DIM + 2): sums, m, l
    const uint2* tokens;
    const Run* runs;
    u32 run_count, heads, kv_heads, context;
    u32 tiles;   // row tiles of a segment
    u32 splits;  // of the keys
    u32 tile_min;  // runs of so many tokens and more are left to attention_tiles
    float scale;
};

__device__ __forceinline__ u64 cache_row(const AttentionArgs& a, u32 slot, u32 head, u32 position) {
    return (((u64)slot * a.kv_heads + head) * a.context + position) * HEAD_DIM;
}

// A block per token.
extern "C" __global__ void __launch_bounds__(256) append_kv(const AttentionArgs a) {
    let_next_begin();
    await_inputs();
    const u32 t = blockIdx.x, width = a.kv_heads * HEAD_DIM;
    const Run run = a.runs[a.tokens[t].y];
    const u32 position = run.position + t - run.start;
    const float* k = a.qkv + (u64)t * (a.heads + 2 * a.kv_heads) * HEAD_DIM + a.heads * HEAD_DIM;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        const u64 to = cache_row(a, run.slot, c / HEAD_DIM, position) + c % HEAD_DIM;
        narrow(k[c], a.keys[to]);
        narrow(k[width + c], a.values[to]);
    }
}

#if BF16
#define UNIT 1.4426950408889634f
__device__ __forceinline__ float power(float x) { return exp2_approx(x); }
#else
#define UNIT 1.0f
__device__ __forceinline__ float power(float x) { return expf(x); }
#endif

// ---- attention_rows -----------------------------------------------------------------------
//
// The rows of a segment are its (token, head of the group) pairs, token by token. A block of 4
// warps does ROWS rows of one kv head against one part of the keys, KEYS at a time, from shared
// memory: a lane per key for the scores, a lane per 32nd column for the sums.

#define ROWS 32
#define KEYS 32
#define OWN (ROWS / 4)  // rows of a warp
#define WIDTH ((HEAD_DIM + 3) / 4 * 4)
#define STRIDE (WIDTH + 4)  // rows 4 banks apart: reads of 16 bytes by 8 lanes do not collide
#define COLS ((HEAD_DIM + 31) / 32)

struct RowsShared {
    float q[ROWS][WIDTH], k[KEYS][STRIDE], v[KEYS][WIDTH];
};

extern "C" __global__ void __launch_bounds__(128) attention_rows(const AttentionArgs a) {
    let_next_begin();
    await_inputs();
    extern __shared__ __align__(16) unsigned char memory[];
    RowsShared& s = *(RowsShared*)memory;
    const u32 segment = blockIdx.x / a.tiles, tile = blockIdx.x % a.tiles;
    const u32 kv_head = blockIdx.y, split = blockIdx.z, group = a.heads / a.kv_heads;
    const Run run = a.runs[run_of_segment(a.runs, a.run_count, segment)];
    const u32 token = (segment - run.segment) * SEGMENT;  // first of the segment, in the run
    if (token >= run.len || run.len >= a.tile_min) return;
    const u32 rows = min(run.len - token, (u32)SEGMENT) * group, first = tile * ROWS;
    if (first >= rows) return;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 stride = (a.heads + 2 * a.kv_heads) * HEAD_DIM;

    for (u32 i = threadIdx.x; i < ROWS * WIDTH; i += 128) {
        const u32 r = first + i / WIDTH, d = i % WIDTH;
        const u32 t = run.start + token + r / group, head = kv_head * group + r % group;
        const bool valid = r < rows && d < HEAD_DIM;
        s.q[i / WIDTH][d] =
            valid ? a.qkv[(u64)t * stride + head * HEAD_DIM + d] * (a.scale * UNIT) : 0.0f;
    }
    // Keys that the last row sees, and the part of them that is this block's.
    const u32 seen = run.position + token + (min(first + ROWS, rows) - 1) / group + 1;
    const u32 part = ((seen + a.splits - 1) / a.splits + KEYS - 1) / KEYS * KEYS;
    const u32 from = min(split * part, seen), to = min(from + part, seen);

    float m[OWN], l[OWN], acc[OWN][COLS];
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
        m[r] = -INFINITY_F, l[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < COLS; ++c) acc[r][c] = 0.0f;
    }
    const u64 base = cache_row(a, run.slot, kv_head, 0);
    for (u32 key = from; key < to; key += KEYS) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < KEYS * WIDTH; i += 128) {
            const u32 j = i / WIDTH, d = i % WIDTH;
            const bool valid = key + j < to && d < HEAD_DIM;
            const u64 at = base + (u64)(key + j) * HEAD_DIM + d;
            s.k[j][d] = valid ? widen(a.keys[at]) : 0.0f;
            s.v[j][d] = valid ? widen(a.values[at]) : 0.0f;
        }
        __syncthreads();

        float score[OWN];
#pragma unroll
        for (int r = 0; r < OWN; ++r) score[r] = 0.0f;
        for (u32 d = 0; d < WIDTH; d += 4) {
            const float4 k = *(const float4*)&s.k[lane][d];
#pragma unroll
            for (int r = 0; r < OWN; ++r) {
                const float4 q = *(const float4*)&s.q[warp * OWN + r][d];
                score[r] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
            }
        }
#pragma unroll
        for (int r = 0; r < OWN; ++r) {
            const u32 position = run.position + token + (first + warp * OWN + r) / group;
            const bool sees = key + lane < to && key + lane <= position;
            const float largest = fmaxf(m[r], warp_max(sees ? score[r] : -INFINITY_F));
            // A row that has seen no key yet keeps m at -inf, and no sums to scale.
            const float shift = largest == -INFINITY_F ? 0.0f : largest;
            const float keep = power(m[r] - shift);
            const float p = sees ? power(score[r] - shift) : 0.0f;
            m[r] = largest;
            l[r] = l[r] * keep + warp_sum(p);
#pragma unroll
            for (int c = 0; c < COLS; ++c) acc[r][c] *= keep;
            score[r] = p;
        }
        for (u32 j = 0; j < min(to - key, (u32)KEYS); ++j) {
            float v[COLS];
#pragma unroll
            for (int c = 0; c < COLS; ++c) {
                v[c] = c * 32 + lane < WIDTH ? s.v[j][c * 32 + lane] : 0.0f;
            }
#pragma unroll
            for (int r = 0; r < OWN; ++r) {
                const float p = __shfl_sync(FULL, score[r], j);
#pragma unroll
                for (int c = 0; c < COLS; ++c) acc[r][c] += p * v[c];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
        const u32 row = first + warp * OWN + r;
        if (row >= rows) continue;
        const u64 t = run.start + token + row / group, head = kv_head * group + row % group;
        float* out = a.splits == 1 ? a.out + (t * a.heads + head) * HEAD_DIM
                                   : a.parts + ((t * a.heads + head) * a.splits + split) *
                                                   (HEAD_DIM + 2);
        const float scale = a.splits == 1 ? 1.0f / l[r] : 1.0f;
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
            if (c * 32 + lane < HEAD_DIM) out[c * 32 + lane] = acc[r][c] * scale;
        }
        if (a.splits > 1 && lane == 0) out[HEAD_DIM] = m[r], out[HEAD_DIM + 1] = l[r];
    }
}

// A block per token and head; a thread per part for the weights, then per column for the sums.
extern "C" __global__ void __launch_bounds__(128) attention_merge(const AttentionArgs a) {
    let_next_begin();
    await_inputs();
    __shared__ float weights[128], warps[4];
    const u64 t = blockIdx.x, row = t * a.heads + blockIdx.y;
    if (a.runs[a.tokens[t].y].len >= a.tile_min) return;
    const float* parts = a.parts + row * a.splits * (HEAD_DIM + 2);
    const u32 i = threadIdx.x;
    const bool part = i < a.splits;
    const float m = part ? parts[i * (HEAD_DIM + 2) + HEAD_DIM] : -INFINITY_F;
    const float l = part ? parts[i * (HEAD_DIM + 2) + HEAD_DIM + 1] : 0.0f;
    float largest = warp_max(m);
    if (i % 32 == 0) warps[i / 32] = largest;
    __syncthreads();
    largest = fmaxf(fmaxf(warps[0], warps[1]), fmaxf(warps[2], warps[3]));
    weights[i] = power(m - largest);
    __syncthreads();
    float sum = warp_sum(weights[i] * l);
    if (i % 32 == 0) warps[i / 32] = sum;
    __syncthreads();
    sum = warps[0] + warps[1] + warps[2] + warps[3];
    for (u32 d = i; d < HEAD_DIM; d += 128) {
        float acc = 0.0f;
#pragma unroll 8
        for (u32 k = 0; k < a.splits; ++k) acc += weights[k] * parts[k * (HEAD_DIM + 2) + d];
        a.out[row * HEAD_DIM + d] = acc / sum;
    }
}

// ---- attention_tiles ----------------------------------------------------------------------
//
// A block of 4 warps per segment of 64 tokens and head; a warp has 16 tokens. Keys and values
// come 64 at a time; the next keys arrive while the values are used, and the other way round.
// Constraints: HEAD_DIM a multiple of 16, at most 128.

#if BF16 && HEAD_DIM % 16 == 0 && HEAD_DIM <= 128

#define TILE 64
#define PITCH (HEAD_DIM + 8)  // rows 16 bytes apart in the banks: ldmatrix does not collide

__device__ __forceinline__ void fetch_tile(bf16 (*to)[PITCH], const bf16* from, u32 first,
                                           u32 count) {
    for (u32 i = threadIdx.x; i < TILE * HEAD_DIM / 8; i += 128) {
        const u32 j = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
        const bool valid = first + j < count;
        copy_async_16(&to[j][d], from + (valid ? (u64)(first + j) * HEAD_DIM + d : 0), valid);
    }
    copy_commit();
}

extern "C" __global__ void __launch_bounds__(128) attention_tiles(const AttentionArgs a) {
    __shared__ __align__(16) bf16 keys[TILE][PITCH], values[TILE][PITCH];
    // Later segments see more keys: they start first.
    const u32 segment = gridDim.x - 1 - blockIdx.x, head = blockIdx.y;
    const Run run = a.runs[run_of_segment(a.runs, a.run_count, segment)];
    const u32 first = (segment - run.segment) * SEGMENT;
    if (first >= run.len || run.len < a.tile_min) return;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 stride = (a.heads + 2 * a.kv_heads) * HEAD_DIM;
    // Rows of this thread in a fragment: low, and low + 8.
    const u32 low = first + warp * 16 + lane / 4;

    u32 q[HEAD_DIM / 16][4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        const u32 row = low + part % 2 * 8;
        const float* x = a.qkv + (u64)(run.start + row) * stride + head * HEAD_DIM +
                         part / 2 * 8 + lane % 4 * 2;
        const float scale = a.scale * UNIT;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            const float2 v = row < run.len ? *(const float2*)(x + d * 16) : make_float2(0, 0);
            q[d][part] = pack_bf16(v.x * scale, v.y * scale);
        }
    }
    const u64 base = cache_row(a, run.slot, head / (a.heads / a.kv_heads), 0);
    const bf16 *all_keys = a.keys + base, *all_values = a.values + base;
    const u32 count = run.position + min(first + SEGMENT, run.len);  // keys that are seen

    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0, 0};
    float acc[HEAD_DIM / 8][4] = {};
    fetch_tile(keys, all_keys, 0, count);
    for (u32 key = 0; key < count; key += TILE) {
        copy_wait<0>();
        __syncthreads();
        fetch_tile(values, all_values, key, count);

        float scores[TILE / 8][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
#pragma unroll
            for (int n = 0; n < TILE / 16; ++n) {
                // 16 keys by 16 columns: matrices of keys 0-7 and 8-15, columns 0-7 and 8-15.
                u32 b[4];
                load_matrices(b, &keys[n * 16 + lane % 8 + lane / 16 * 8]
                                      [d * 16 + lane / 8 % 2 * 8]);
                mma_bf16(scores[2 * n], q[d], b[0], b[1]);
                mma_bf16(scores[2 * n + 1], q[d], b[2], b[3]);
            }
        }
        if (key + TILE > run.position + first + warp * 16) {
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 at = key + n * 8 + lane % 4 * 2 + i % 2;
                    if (at > run.position + low + i / 2 * 8) scores[n][i] = -INFINITY_F;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = m[half];
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
                largest = fmaxf(largest, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
            const float shift = largest == -INFINITY_F ? 0.0f : largest;
            const float keep = power(m[half] - shift);
            m[half] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    scores[n][i] = power(scores[n][i] - shift);
                    sum += scores[n][i];
                }
            }
            l[half] = l[half] * keep + sum;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; ++d) {
                acc[d][half * 2] *= keep, acc[d][half * 2 + 1] *= keep;
            }
        }
        copy_wait<0>();
        __syncthreads();
        if (key + TILE < count) fetch_tile(keys, all_keys, key + TILE, count);

#pragma unroll
        for (int n = 0; n < TILE / 16; ++n) {
            // The scores of 16 keys are the left operand as they are.
            const u32 p[4] = {pack_bf16(scores[2 * n][0], scores[2 * n][1]),
                              pack_bf16(scores[2 * n][2], scores[2 * n][3]),
                              pack_bf16(scores[2 * n + 1][0], scores[2 * n + 1][1]),
                              pack_bf16(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d) {
                u32 b[4];
                load_matrices_transposed(b, &values[n * 16 + lane % 16][d * 16 + lane / 16 * 8]);
                mma_bf16(acc[2 * d], p, b[0], b[1]);
                mma_bf16(acc[2 * d + 1], p, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 row = low + half * 8;
        float sum = l[half] + __shfl_xor_sync(FULL, l[half], 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        if (row >= run.len) continue;
        float* out = a.out + ((u64)(run.start + row) * a.heads + head) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) {
            *(float2*)(out + d * 8) =
                make_float2(acc[d][half * 2] / sum, acc[d][half * 2 + 1] / sum);
        }
    }
}
#endif
