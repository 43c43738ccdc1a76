// Attention (attention.cu) of segments of many queries on the tensor cores of sm_90a.
//
// Layout: as in attention.cu; keys and values by maps of boxes of (KEYS, 64) over the rows of all
// slots and heads.
// Threads: a block per two segments of a run and head. One thread keeps STAGES tiles of KEYS keys
// and values on their way; two groups of four warps have a segment each, 16 queries per warp. While
// one group computes exponentials, the other multiplies. (Queries in registers, 32 of them for heads
// of 128, are not kept by the ptxas of CUDA 13.0: those of the weights p overwrite them.)
// Constraints: HEAD_DIM 64 or 128; kv heads and the cache as in attention.cu.

#define KEYS 128
#define STAGES 2
#define HALVES (HEAD_DIM / 64)

struct GroupsArgs {
    TensorMap keys, values;
    const float* qkv;
    float* out;
    const Run* runs;
    u32 run_count, heads, kv_heads, context;
    u32 tile_min;  // runs of fewer tokens are left to attention_rows
    float scale;
};

struct GroupsShared {
    bf16 keys[STAGES][HALVES][KEYS][64], values[STAGES][HALVES][KEYS][64];
    bf16 queries[2][HALVES][SEGMENT][64];
    u64 keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
};

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_groups(const __grid_constant__ GroupsArgs a) {
    extern __shared__ unsigned char memory[];
    GroupsShared& s = *(GroupsShared*)(((u64)memory + 1023) & ~1023ull);
    // Later segments see more keys: they start first.
    const u32 segment = gridDim.x - 1 - blockIdx.x, head = blockIdx.y;
    const Run run = a.runs[run_of_segment(a.runs, a.run_count, segment)];
    const u32 first = (segment - run.segment) * SEGMENT;
    if (first >= run.len || first % (2 * SEGMENT) != 0 || run.len < a.tile_min) return;
    const u32 count = run.position + min(first + 2 * SEGMENT, run.len);  // keys that are seen
    const u32 tiles = (count + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&s.keys_full[i], 1), barrier_init(&s.keys_empty[i], 2);
            barrier_init(&s.values_full[i], 1), barrier_init(&s.values_empty[i], 2);
        }
        barrier_init_done();
    }
    __syncthreads();
    const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (group == 0) {
        fewer_registers<24>();
        if (threadIdx.x != 0) return;
        const u32 base = (run.slot * a.kv_heads + head / (a.heads / a.kv_heads)) * a.context;
        for (u32 tile = 0; tile < tiles; ++tile) {
            const u32 i = tile % STAGES, parity = (tile / STAGES - 1) % 2;
            if (tile >= STAGES) barrier_wait(&s.keys_empty[i], parity);
            barrier_expect(&s.keys_full[i], sizeof(s.keys[i]));
            for (u32 h = 0; h < HALVES; ++h) {
                copy_box(s.keys[i][h], a.keys, h * 64, base + tile * KEYS, &s.keys_full[i]);
            }
            if (tile >= STAGES) barrier_wait(&s.values_empty[i], parity);
            barrier_expect(&s.values_full[i], sizeof(s.values[i]));
            for (u32 h = 0; h < HALVES; ++h) {
                copy_box(s.values[i][h], a.values, h * 64, base + tile * KEYS, &s.values_full[i]);
            }
        }
        return;
    }
    more_registers<240>();
    // Rows of this thread: low, and low + 8.
    const u32 low = first + (group - 1) * SEGMENT + warp * 16 + lane / 4;
    const u32 stride = (a.heads + 2 * a.kv_heads) * HEAD_DIM;
    bf16 (*queries)[SEGMENT][64] = s.queries[group - 1];
#pragma unroll
    for (u32 e = threadIdx.x % 128; e < SEGMENT * HEAD_DIM / 8; e += 128) {
        const u32 row = e / (HEAD_DIM / 8), chunk = e % (HEAD_DIM / 8);
        const u32 t = first + (group - 1) * SEGMENT + row;
        const float scale = a.scale * 1.4426950408889634f;
        uint4 q = make_uint4(0, 0, 0, 0);
        if (t < run.len) {
            const float4* x = (const float4*)(a.qkv + (u64)(run.start + t) * stride +
                                              head * HEAD_DIM + chunk * 8);
            const float4 u = x[0], v = x[1];
            q = make_uint4(pack_bf16(u.x * scale, u.y * scale), pack_bf16(u.z * scale, u.w * scale),
                           pack_bf16(v.x * scale, v.y * scale), pack_bf16(v.z * scale, v.w * scale));
        }
        *swizzled(queries[chunk / 8], row, chunk % 8) = q;
    }
    publish_shared();
    group_sync(1 + group, 128);
    const bool arrives = threadIdx.x % 128 == 0;
    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0, 0};
    float acc[HEAD_DIM / 2], scores[KEYS / 2];
    u32 p[KEYS / 16][4];
    for (u32 tile = 0; tile < tiles; ++tile) {
        const u32 i = tile % STAGES, parity = tile / STAGES % 2, key = tile * KEYS;
        barrier_wait(&s.keys_full[i], parity);
        products_begin();
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            const u64 q = operand(queries[d / 4]) + d % 4 * 2;
            product_64_128(scores, q, operand(s.keys[i][d / 4]) + d % 4 * 2, d > 0);
        }
        products_commit();
        if (tile > 0) {
            products_wait<1>();
            if (arrives) barrier_arrive(&s.values_empty[(tile - 1) % STAGES]);
        }
        products_wait<0>();
        if (arrives) barrier_arrive(&s.keys_empty[i]);

        if (key + KEYS > run.position + first + (group - 1) * SEGMENT) {
#pragma unroll
            for (int n = 0; n < KEYS / 2; ++n) {
                const u32 at = key + n / 4 * 8 + lane % 4 * 2 + n % 2;
                if (at > run.position + low + n / 2 % 2 * 8) scores[n] = -INFINITY_F;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = m[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                const float* score = &scores[n * 4 + half * 2];
                largest = fmaxf(largest, fmaxf(score[0], score[1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
            const float keep = exp2_approx(m[half] - largest);
            m[half] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                float* score = &scores[n * 4 + half * 2];
                score[0] = exp2_approx(score[0] - largest);
                score[1] = exp2_approx(score[1] - largest);
                sum += score[0] + score[1];
            }
            l[half] = l[half] * keep + sum;
            if (tile > 0) {
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 8; ++d) {
                    acc[d * 4 + half * 2] *= keep, acc[d * 4 + half * 2 + 1] *= keep;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const int at = n * 8 + part * 2;
                p[n][part] = pack_bf16(scores[at], scores[at + 1]);
            }
        }
        barrier_wait(&s.values_full[i], parity);
        if (key + KEYS > count) {
            // Values that nobody wrote may be anything, and 0 times that is not 0.
            for (u32 e = threadIdx.x - 128; e < HALVES * (key + KEYS - count) * 8; e += 256) {
                const u32 row = count - key + e / 8 % (key + KEYS - count);
                const u32 h = e / 8 / (key + KEYS - count);
                *(uint4*)&s.values[i][h][row][e % 8 * 8] = make_uint4(0, 0, 0, 0);
            }
            publish_shared();
            group_sync(1, 256);
        }
        products_begin();
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            const u64 b = operand_columns(s.values[i], KEYS * 128) + n * 128;
            product_columns(acc, p[n], b, tile > 0 || n > 0);
        }
        products_commit();
    }
    products_wait<0>();
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
                make_float2(acc[d * 4 + half * 2] / sum, acc[d * 4 + half * 2 + 1] / sum);
        }
    }
}
