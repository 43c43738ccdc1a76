// Routed experts. Per token, with p = softmax(router_logits) over all experts, not renormalised:
//
//   out = sum_{e in top_k(p)} p[e] W_down[e] (silu(W_gate[e] x) * W_up[e] x)
//
// An *entry* is a (token, place among its top_k) pair, numbered token by token; a token's places
// are in the order of its experts' numbers, and its experts are added in that order.
//
// moe_route    chooses; of equal logits the lower expert
// moe_sort     entries by expert, then number, without atomics: the same order every time
// moe_gate_up_rows, moe_down_rows    few tokens: a warp per column, the weights of an expert are
//                                    read for every entry (quantised ones: packed.cu)
// moe_gate_up_*, moe_down_*          many tokens: tiles of the entries of one expert, tensor cores
//                                    in bf16 (moe_tiles.cu), CUDA cores in f32
// moe_gather_* bf16: the rows of x by sorted entry, for the products of sm_90a: few_groups.cu, and
//              grouped.cu, which gives those of the entries in bf16, times p
// moe_combine, moe_combine_bf16      out from the products of the entries
//
// Layout: logits (tokens, experts), p and expert (entries), x (tokens, hidden) f32; gate_up
// (experts 2 inter, ld) with rows [gate; up] per expert, down (experts hidden, ld) weight_t;
// act (entries, inter) f32 by number; out (tokens, hidden) f32.
// Constraints: experts <= 1024.

struct RouteArgs {
    const float* logits;
    u32* expert;
    float* p;
    u32 tokens, experts, top_k;
};

// The order of f32 as integers, -0 below +0 and NaN outermost: what total_cmp says.
__device__ __forceinline__ int total_order(float v) {
    const int bits = __float_as_int(v);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// A warp per token; lane l has experts l, l + 32, ...
extern "C" __global__ void __launch_bounds__(128) moe_route(const RouteArgs a) {
    let_next_begin();
    await_inputs();
    const u32 token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= a.tokens) return;
    const float* logits = a.logits + (u64)token * a.experts;
    float largest = -INFINITY_F, sum = 0.0f;
    for (u32 e = lane; e < a.experts; e += 32) largest = fmaxf(largest, logits[e]);
    largest = warp_max(largest);
    for (u32 e = lane; e < a.experts; e += 32) sum += expf(logits[e] - largest);
    sum = warp_sum(sum);

    u32 taken = 0;  // bit i: expert lane + 32 i
    for (u32 k = 0; k < a.top_k; ++k) {
        // 64 bits: the order of the logit, then lower experts first. None is 0.
        u64 best = 0;
        for (u32 e = lane, bit = 1; e < a.experts; e += 32, bit <<= 1) {
            if (taken & bit) continue;
            const u32 order = (u32)total_order(logits[e]) ^ 0x80000000u;
            const u64 key = (u64)order << 32 | (FULL - e);
            best = key > best ? key : best;
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) {
            const u64 other = __shfl_xor_sync(FULL, best, mask);
            best = other > best ? other : best;
        }
        const u32 e = FULL - (u32)best;
        if (e % 32 == lane) taken |= 1u << (e / 32);
    }
    // The chosen in the order of their numbers.
    u32 place = token * a.top_k;
    for (u32 base = 0; base < a.experts; base += 32) {
        const bool chosen = taken >> (base / 32) & 1;
        const u32 all = __ballot_sync(FULL, chosen);
        if (chosen) {
            const u32 at = place + __popc(all & ((1u << lane) - 1));
            a.expert[at] = base + lane;
            a.p[at] = expf(logits[base + lane] - largest) / sum;
        }
        place += __popc(all);
    }
}

struct SortArgs {
    const u32* expert;
    u32* start;   // (experts + 1): of the entries of each expert among the sorted
    u32* sorted;  // (entries): their numbers
    u32* place;   // (entries): where each is among the sorted
    u32 entries, experts;
};

// A block per expert, which reads all entries twice: how many belong to lower experts, then its
// own, in order.
extern "C" __global__ void __launch_bounds__(256) moe_sort(const SortArgs a) {
    let_next_begin();
    await_inputs();
    __shared__ u32 counts[8];
    const u32 own = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 lower = 0;
    for (u32 i = threadIdx.x; i < a.entries; i += 256) lower += a.expert[i] < own;
    lower = __reduce_add_sync(FULL, lower);
    if (lane == 0) counts[warp] = lower;
    __syncthreads();
    u32 next = 0;
    for (u32 w = 0; w < 8; ++w) next += counts[w];
    if (threadIdx.x == 0) {
        a.start[own] = next;
        if (own + 1 == a.experts) a.start[a.experts] = a.entries;
    }
    for (u32 base = 0; base < a.entries; base += 256) {
        const u32 i = base + threadIdx.x;
        const bool mine = i < a.entries && a.expert[i] == own;
        const u32 all = __ballot_sync(FULL, mine);
        __syncthreads();
        if (lane == 0) counts[warp] = __popc(all);
        __syncthreads();
        u32 at = next + __popc(all & ((1u << lane) - 1));
        for (u32 w = 0; w < 8; ++w) {
            if (w < warp) at += counts[w];
            next += counts[w];
        }
        if (mine) a.sorted[at] = i, a.place[i] = at;
    }
}

struct RowsArgs {
    const float* x;
    const weight_t* w;
    const u32* expert;
    const float* p;
    float* out;
    u32 hidden, inter, top_k, ldw;
};

// Sum over k of w x in a warp; rows of w are aligned to 16 bytes and zero beyond k.
__device__ __forceinline__ float dot(const weight_t* w, const float* x, u32 k) {
    float sum = 0.0f;
    const bool aligned = k % WEIGHT_VECTOR == 0 && (u64)x % 16 == 0;
#pragma unroll 4
    for (u32 i = threadIdx.x % 32 * WEIGHT_VECTOR; i < k; i += 32 * WEIGHT_VECTOR) {
        float wide[WEIGHT_VECTOR];
        widen_16(load_streaming(w + i), wide);
#pragma unroll
        for (int v = 0; v < WEIGHT_VECTOR; v += 4) {
            if (aligned) {
                const float4 in = *(const float4*)(x + i + v);
                sum += in.x * wide[v] + in.y * wide[v + 1] + in.z * wide[v + 2] +
                       in.w * wide[v + 3];
            } else {
                for (int j = v; j < v + 4; ++j) sum += i + j < k ? x[i + j] * wide[j] : 0.0f;
            }
        }
    }
    return warp_sum(sum);
}

// act[entry, j] = silu(gate) up: 4 columns j per block, an entry along y.
extern "C" __global__ void __launch_bounds__(128) moe_gate_up_rows(const RowsArgs a) {
    let_next_begin();
    await_inputs();
    const u32 entry = blockIdx.y, j = blockIdx.x * 4 + threadIdx.x / 32;
    if (j >= a.inter) return;
    const float* x = a.x + (u64)(entry / a.top_k) * a.hidden;
    const weight_t* gate = a.w + ((u64)a.expert[entry] * 2 * a.inter + j) * a.ldw;
    const float g = dot(gate, x, a.hidden);
    const float u = dot(gate + (u64)a.inter * a.ldw, x, a.hidden);
    if (threadIdx.x % 32 == 0) a.out[(u64)entry * a.inter + j] = silu(g) * u;
}

// out[token, j] = sum_k p y: 4 columns j per block, a token along y.
extern "C" __global__ void __launch_bounds__(128) moe_down_rows(const RowsArgs a) {
    let_next_begin();
    await_inputs();
    const u32 token = blockIdx.y, j = blockIdx.x * 4 + threadIdx.x / 32;
    if (j >= a.hidden) return;
    float sum = 0.0f;
    for (u32 entry = token * a.top_k; entry < (token + 1) * a.top_k; ++entry) {
        const weight_t* w = a.w + ((u64)a.expert[entry] * a.hidden + j) * a.ldw;
        sum += a.p[entry] * dot(w, a.x + (u64)entry * a.inter, a.inter);
    }
    if (threadIdx.x % 32 == 0) a.out[(u64)token * a.hidden + j] = sum;
}

#if BF16
struct GatherArgs {
    const void* x;      // (tokens, ldx) f32 or bf16
    const u32* sorted;
    bf16* out;          // (entries, hidden)
    u32 hidden, ldx, top_k;
};

// A block per sorted entry; hidden and ldx multiples of 8, x aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(256) moe_gather_f32(const GatherArgs a) {
    let_next_begin();
    await_inputs();
    const u64 token = a.sorted[blockIdx.x] / a.top_k;
    const float* x = (const float*)a.x + token * a.ldx;
    for (u32 c = threadIdx.x * 8; c < a.hidden; c += 256 * 8) {
        const float4 low = *(const float4*)(x + c), high = *(const float4*)(x + c + 4);
        *(uint4*)(a.out + (u64)blockIdx.x * a.hidden + c) =
            make_uint4(pack_bf16(low.x, low.y), pack_bf16(low.z, low.w),
                       pack_bf16(high.x, high.y), pack_bf16(high.z, high.w));
    }
}
extern "C" __global__ void __launch_bounds__(256) moe_gather_bf16(const GatherArgs a) {
    let_next_begin();
    await_inputs();
    const u64 token = a.sorted[blockIdx.x] / a.top_k;
    const bf16* x = (const bf16*)a.x + token * a.ldx;
    for (u32 c = threadIdx.x * 8; c < a.hidden; c += 256 * 8) {
        *(uint4*)(a.out + (u64)blockIdx.x * a.hidden + c) = *(const uint4*)(x + c);
    }
}
#endif

struct CombineArgs {
    const float* y;    // (entries, hidden), sorted
    const u32* place;  // (entries)
    const float* p;
    float* out;
    u32 hidden, top_k;
};

// A block per token.
extern "C" __global__ void __launch_bounds__(256) moe_combine(const CombineArgs a) {
    let_next_begin();
    await_inputs();
    const u32 token = blockIdx.x;
    for (u32 c = threadIdx.x; c < a.hidden; c += 256) {
        float sum = 0.0f;
        for (u32 k = token * a.top_k; k < (token + 1) * a.top_k; ++k) {
            sum += a.p[k] * a.y[(u64)a.place[k] * a.hidden + c];
        }
        a.out[(u64)token * a.hidden + c] = sum;
    }
}

#if BF16
struct CombineBf16Args {
    const bf16* y;     // (entries, hidden), sorted, times p
    const u32* place;  // (entries)
    float* out;        // (tokens, hidden)
    u32 hidden, top_k;
};

// A block per token; hidden a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) moe_combine_bf16(const CombineBf16Args a) {
    const u64 token = blockIdx.x;
    for (u32 c = threadIdx.x * 8; c < a.hidden; c += 256 * 8) {
        float sum[8] = {};
        for (u32 k = token * a.top_k; k < (token + 1) * a.top_k; ++k) {
            float y[8];
            widen_16(*(const uint4*)(a.y + (u64)a.place[k] * a.hidden + c), y);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += y[i];
        }
        float* out = a.out + token * a.hidden + c;
        *(float4*)out = make_float4(sum[0], sum[1], sum[2], sum[3]);
        *(float4*)(out + 4) = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
}
#endif
