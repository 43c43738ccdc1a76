// Products of a few rows of x with a quantised matrix: what a decode step of few sequences does, bound
// by the bytes of W. (linear.cu: of W that is not quantised; few.cu: of more rows.)
//
//   linear_ROWS    out = x W^T + bias
//   gated_ROWS     out = silu(x W_gate^T) * (x W_up^T), W = [W_gate; W_up]
//   expert_gated   the same for every entry, W that of its expert (moe.cu has what an entry is)
//   expert_down    out = sum over the entries of a token of p x W[e]^T
//
// In the first two x may still have to be normed: of x + r, which goes to `sum`, or of x itself, the
// product is that of the norm, see norm.cu.
//
// Layout: x (rows, ldx) f32; W of n rows (gated: 2 n) of `stride` bytes as PACKING says, its scales
// `scale_stride` bytes apart; bias f32; out (rows, ldo) f32. PACKING: 1 int8 with an f32 scale per
// row; 2 int8 and 3 four bits in blocks of 32 with a bf16 scale each (jamba_core::quant has the
// bytes).
// Arithmetic: 32 values of x become integers of 15 bits and a sign times a power of two, the least that
// takes the largest of them, and these two planes of bytes, so that dp4a multiplies four weights with
// a byte each. What dp4a adds, of a block or half of one, is exact, and rounded to f32 once. A value
// of x is off by at most 2^-14 of the largest of 32, where bf16 is by up to 2^-9 of itself: a sum of
// random ones by a thirtieth to a fiftieth of what rounding x to bf16 would cost.
// Threads: a block for a multiprocessor, with consecutive tasks of OUTPUTS rows of W, cut into chunks of
// 512 bytes of each row. Its warps take equal, consecutive parts of all these chunks: a task may be of
// several warps, whose sums are added in order. What a warp multiplies next comes to a ring in shared
// memory of its own, the first STAGES chunks while the kernels before this one still run, as only x is
// theirs. Each block makes the planes of x for itself.
// Constraints: n at least OUTPUTS (gated: half), k a multiple of 4, to be normed up to MOST_NORMED, x and
// ldx of 16 bytes, W, stride and, of blocks, scales and scale_stride too.

#define OUTPUTS 4
#define WARPS 16
#define THREADS (32 * WARPS)
#define CHUNK 512                      // bytes of each row
#define LANE (PACKING == 3 ? 32 : 16)  // weights of a row in a chunk that a lane multiplies
#define WEIGHTS (32 * LANE)            // of a row in a chunk
// Of a chunk's scales, of a row of W and in all.
#define SCALE_BYTES (PACKING == 1 ? 4 : WEIGHTS / 32 * 2)
#define STAGE (OUTPUTS * (CHUNK + SCALE_BYTES))
#define BATCH 2  // of 8 values of x that a thread asks for at a time
#define MOST_NORMED (THREADS * 8)

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
    u32 x_first;        // whether x is there when the kernel begins
    float eps;
    const float* norm;  // weight of the norm, or null
    const float* r;     // as x, or null
    float* sum;         // not x, which all blocks read
};

// Products of four bytes each, added to c. Those of a are signed in the first two; those of b are
// weights, of four bits unsigned.
__device__ __forceinline__ int dot_high(u32 a, u32 b, int c) {
    int d;
#if PACKING == 3
    asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}
__device__ __forceinline__ int dot_low(u32 a, u32 b, int c) {
    int d;
#if PACKING == 3
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// What of a block of 32 is not its bytes: their unit, and what the sum begins with.
struct Unit {
    float scale;
#if PACKING == 3
    int first;  // weights are q + 8
#endif
};

// Rows of x in shared memory: the lower bytes of all, the upper ones, and what each block has.
struct Planes {
    unsigned char* rows;
    u32 width;  // values of a row, whole chunks

    __device__ __forceinline__ Planes(unsigned char* rows, u32 k)
        : rows(rows), width((k + WEIGHTS - 1) / WEIGHTS * WEIGHTS) {}

    __device__ __forceinline__ unsigned char* low(u32 row) const {
        return rows + row * (2 * width + width / 32 * (u32)sizeof(Unit));
    }
    __device__ __forceinline__ unsigned char* high(u32 row) const { return low(row) + width; }
    __device__ __forceinline__ Unit* units(u32 row) const {
        return (Unit*)(low(row) + 2 * width);
    }

    // Where value i is: the halves of a block of four bits lie apart.
    __device__ __forceinline__ u32 place(u32 i) const {
        return PACKING == 3 ? i / 16 % 2 * (width / 2) + i / 32 * 16 + i % 16 : i;
    }

    // Value `first` of what a thread has in batch b.
    static __device__ __forceinline__ u32 own(int b) { return (b * THREADS + threadIdx.x) * 8; }

    // From k values, times `factor`. Every thread of the block comes here. `loaded` is called once,
    // when the first values have been asked for.
    template <class Loaded>
    __device__ __forceinline__ void fill(u32 row, const float* x, u32 k, float factor,
                                         Loaded loaded) const {
        for (u32 start = 0; start < width; start += BATCH * THREADS * 8) {
            float v[BATCH][8];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) load_8(v[b], x, start + own(b), k);
            if (start == 0) loaded(row);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) put(row, v[b], start + own(b), factor);
        }
    }

    // From the norm of k values, w of which this thread has; to the bit what norm.cu makes of them, a
    // thread being two of those there, and half a warp one. `sums` has room for two of each warp.
    template <class Loaded>
    __device__ __forceinline__ void fill_normed(u32 row, const PackedArgs& a, const float (&w)[8],
                                                float* sums, Loaded loaded) const {
        const u64 at = (u64)row * a.ldx;
        float v[8], r[8];
        load_8(v, a.x + at, own(0), a.k);
        if (a.r) load_8(r, a.r + at, own(0), a.k);
        loaded(row);
        if (a.r) {
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] += r[i];
            if (blockIdx.x == 0) store_8(a.sum + at, v, own(0), a.k);
        }
        float low = squares(make_float4(v[0], v[1], v[2], v[3]));
        float high = squares(make_float4(v[4], v[5], v[6], v[7]));
#pragma unroll
        for (int mask = 8; mask > 0; mask >>= 1) {
            low += __shfl_xor_sync(FULL, low, mask);
            high += __shfl_xor_sync(FULL, high, mask);
        }
        if (threadIdx.x % 16 == 0) sums[threadIdx.x / 16] = low + high;
        __syncthreads();
        const float scale = rsqrtf(warp_sum(sums[threadIdx.x % 32]) / a.k + a.eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = v[i] * scale * w[i];
        put(row, v, own(0), 1.0f);
    }

    static __device__ __forceinline__ void load_8(float (&v)[8], const float* x, u32 i, u32 k) {
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4 low = i < k ? *(const float4*)(x + i) : zero;
        const float4 high = i + 4 < k ? *(const float4*)(x + i + 4) : zero;
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
    static __device__ __forceinline__ void store_8(float* x, const float (&v)[8], u32 i, u32 k) {
        if (i < k) *(float4*)(x + i) = make_float4(v[0], v[1], v[2], v[3]);
        if (i + 4 < k) *(float4*)(x + i + 4) = make_float4(v[4], v[5], v[6], v[7]);
    }

    // Of two numbers that are not negative; of one that is not a number this.
    static __device__ __forceinline__ float larger(float a, float b) {
        float c;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
        return c;
    }

    // Values from i on; four lanes have a block. All lanes of a warp, which are all within the row or
    // all beyond.
    __device__ __forceinline__ void put(u32 row, const float (&v)[8], u32 i, float factor) const {
        if (i >= width) return;
        float largest = fabsf(v[0]);
#pragma unroll
        for (int n = 1; n < 8; ++n) largest = larger(largest, fabsf(v[n]));
        largest = larger(largest, __shfl_xor_sync(FULL, largest, 1));
        largest = larger(largest, __shfl_xor_sync(FULL, largest, 2));
        // With 2^e <= largest < 2^(e + 1) the unit is 2^(e - 13); where that would be subnormal, the
        // least normal number.
        const u32 bits = __float_as_uint(largest), e = max(bits >> 23, 14u);
        const float inverse = __uint_as_float((267 - e) << 23);
        // 1.5 * 2^23 + q has the 16 bits of q below.
        u32 q[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) q[n] = __float_as_uint(fmaf(v[n], inverse, 12582912.0f));
        u32 lows[2], highs[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const u32 a = __byte_perm(q[4 * n], q[4 * n + 1], 0x5140);
            const u32 b = __byte_perm(q[4 * n + 2], q[4 * n + 3], 0x5140);
            lows[n] = __byte_perm(a, b, 0x5410), highs[n] = __byte_perm(a, b, 0x7632);
        }
        *(uint2*)(low(row) + place(i)) = make_uint2(lows[0], lows[1]);
        *(uint2*)(high(row) + place(i)) = make_uint2(highs[0], highs[1]);
        Unit unit;
        // What is infinite or not a number is to be seen in the result.
        unit.scale = bits >= 0x7f800000u ? __uint_as_float(0x7fffffffu)
                                         : __uint_as_float((e - 13) << 23) * factor;
#if PACKING == 3
        const u32 ones = 0x01010101u;
        int sum = 256 * dot_high(highs[0], ones, dot_high(highs[1], ones, 0)) +
                  dot_low(lows[0], ones, dot_low(lows[1], ones, 0));
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        unit.first = -8 * sum;
#endif
        if (i % 32 == 0) units(row)[i / 32] = unit;
    }
};

// Which weights a warp copies next, or multiplies.
template <bool GATED, bool EXPERTS>
struct Walk {
    static constexpr u32 EACH = GATED ? OUTPUTS / 2 : OUTPUTS;  // columns of out of a task

    u32 task, segment, chunk;
    // Of this lane in the first of the rows: what it copies.
    const unsigned char* w;
    const unsigned char* scales;

    // From the first two rows of a task to its other two.
    static __device__ __forceinline__ u32 below(const PackedArgs& a) { return GATED ? a.n : 2; }
    static __device__ __forceinline__ u32 first(const PackedArgs& a, u32 task) {
        return min(task * EACH, a.n - EACH);
    }

    __device__ __forceinline__ void seek(const PackedArgs& a, u32 entry) {
        const u32 lane = threadIdx.x % 32;
        u64 row = first(a, task);
        if (EXPERTS) row += (u64)a.expert[entry + segment] * (GATED ? 2 * a.n : a.n);
        w = a.w + row * a.stride + chunk * CHUNK + lane * 16;
        // Scales of row lane / 8, or of row `lane`.
        const u32 j = PACKING == 1 ? lane % OUTPUTS : lane / 8;
        scales = a.scales + (row + j / 2 * below(a) + j % 2) * a.scale_stride;
        if (PACKING >= 2) scales += chunk * SCALE_BYTES + lane % 8 * (SCALE_BYTES / 8);
    }

    // Says whether the task is over.
    __device__ __forceinline__ bool advance(u32 chunks, u32 segments) {
        if (++chunk < chunks) return false;
        chunk = 0;
        const bool is_over = !EXPERTS || ++segment == segments;
        if (is_over) segment = 0, ++task;
        return is_over;
    }
    __device__ __forceinline__ void next(const PackedArgs& a, u32 chunks, u32 segments, u32 entry) {
        w += CHUNK;
        if (PACKING >= 2) scales += SCALE_BYTES;
        advance(chunks, segments);
        if (chunk == 0) seek(a, entry);
    }

    // Asks for the chunk.
    __device__ __forceinline__ void copy(const PackedArgs& a, unsigned char* to) const {
        const u32 lane = threadIdx.x % 32;
        const bool valid = chunk * CHUNK + lane * 16 < a.stride;
        const u64 down = (u64)below(a) * a.stride;
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) {
            const unsigned char* from = w + (j / 2 ? down : 0) + j % 2 * a.stride;
            copy_async_16(to + j * CHUNK + lane * 16, valid ? from : a.w, valid);
        }
        unsigned char* scales_to = to + OUTPUTS * CHUNK;
#if PACKING == 1
        if (lane < OUTPUTS) copy_async_4(scales_to + lane * 4, scales, true);
#elif PACKING == 2
        const bool has = chunk * SCALE_BYTES + lane % 8 * 4 < a.scale_stride;
        copy_async_4(scales_to + lane * 4, has ? scales : a.scales, has);
#else
        const bool has = chunk * SCALE_BYTES + lane % 8 * 8 < a.scale_stride;
        copy_async_8(scales_to + lane * 8, has ? scales : a.scales, has);
#endif
    }
};

// acc += x W^T of a chunk, of the rows of x from `first` on.
template <int ROWS>
__device__ __forceinline__ void multiply(const unsigned char* stage, const Planes& x, u32 first,
                                         u32 chunk, float (&acc)[ROWS][OUTPUTS]) {
    const u32 lane = threadIdx.x % 32;
    constexpr int PARTS = LANE / 16;
    uint4 low[ROWS][PARTS], high[ROWS][PARTS];
    Unit unit[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u32 at = part * (x.width / 2) + (chunk * 32 + lane) * 16;
            low[r][part] = *(const uint4*)(x.low(first + r) + at);
            high[r][part] = *(const uint4*)(x.high(first + r) + at);
        }
        unit[r] = x.units(first + r)[(chunk * 32 + lane) * LANE / 32];
    }
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) {
        const uint4 raw = *(const uint4*)(stage + j * CHUNK + lane * 16);
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
        const unsigned char* at = stage + OUTPUTS * CHUNK + j * SCALE_BYTES;
        const float scale =
            PACKING == 1 ? *(const float*)at : widen(((const bf16*)at)[lane * LANE / 32]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int upper = 0, lower = 0;
#if PACKING == 3
            lower = unit[r].first;
#endif
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const u32 lows[4] = {low[r][part].x, low[r][part].y, low[r][part].z, low[r][part].w};
                const u32 highs[4] = {high[r][part].x, high[r][part].y, high[r][part].z,
                                      high[r][part].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 q = PACKING == 3 ? (words[i] >> 4 * part) & 0x0f0f0f0fu : words[i];
                    upper = dot_high(highs[i], q, upper);
                    lower = dot_low(lows[i], q, lower);
                }
            }
            acc[r][j] += (float)(upper * 256 + lower) * (scale * unit[r].scale);
        }
    }
}

// The sums of all lanes: number i in the lanes from 32 / COUNT i on.
template <int COUNT>
__device__ __forceinline__ float sums_of_lanes(float (&v)[COUNT]) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const int half = mask * COUNT / 32;
        if (half == 0) v[0] += __shfl_xor_sync(FULL, v[0], mask);
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            if (i >= half) break;
            const bool upper = lane & mask;
            const float own = upper ? v[i + half] : v[i], other = upper ? v[i] : v[i + half];
            v[i] = own + __shfl_xor_sync(FULL, other, mask);
        }
    }
    return v[0];
}

// KIND: LINEAR and GATED of matrices, the others of experts.
enum Kind { LINEAR, GATED, EXPERT_GATED, EXPERT_DOWN };

template <int ROWS, Kind KIND>
__device__ __forceinline__ void product(const PackedArgs& a) {
    constexpr bool IS_GATED = KIND == GATED || KIND == EXPERT_GATED;
    constexpr bool EXPERTS = KIND == EXPERT_GATED || KIND == EXPERT_DOWN;
    constexpr int SUMS = ROWS * OUTPUTS, SPREAD = 32 / SUMS;
    typedef Walk<IS_GATED, EXPERTS> Walk;
    extern __shared__ __align__(16) unsigned char shared[];
    // Of the first task of a warp if it began in one before, and of the last if one after ends it.
    __shared__ float ends[WARPS][2][SUMS];
    __shared__ float sums[EXPERTS ? 1 : ROWS][2 * WARPS];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char* ring = shared + warp * STAGES * STAGE;

    const u32 chunks = (a.stride + CHUNK - 1) / CHUNK;
    const u32 segments = KIND == EXPERT_DOWN ? a.top_k : 1, span = segments * chunks;
    const u32 entry = EXPERTS ? blockIdx.y * segments : 0;
    const u32 tasks = (a.n + Walk::EACH - 1) / Walk::EACH;
    const u32 first = (u64)blockIdx.x * tasks / gridDim.x;
    const u32 all = (u32)((u64)(blockIdx.x + 1) * tasks / gridDim.x - first) * span;
    // Of the chunks of the block those of a warp.
    auto begin_of = [&](u32 warp) { return (u32)((u64)warp * all / WARPS); };
    const u32 begin = begin_of(warp), end = begin_of(warp + 1);

    let_next_begin();
    // Which weights they are is known only then.
    if (EXPERTS) await_inputs();
    Walk copied;
    copied.task = first + begin / span;
    copied.segment = begin % span / chunks, copied.chunk = begin % chunks;
    Walk at = copied;
    u32 to_copy = end - begin;
    if (to_copy > 0) copied.seek(a, entry);
    auto copy_next = [&](u32 slot) {
        if (to_copy > 0) {
            copied.copy(a, ring + slot * STAGE);
            // Nobody looks for what is after the last.
            if (--to_copy > 0) copied.next(a, chunks, segments, entry);
        }
        copy_commit();
    };
    auto fill_ring = [&](u32 from, u32 to) {
#pragma unroll
        for (u32 i = from; i < to; ++i) copy_next(i);
    };
    const bool x_first = EXPERTS || a.x_first;
    float norm[8];
    if (!EXPERTS) {
        if (a.norm) Planes::load_8(norm, a.norm, Planes::own(0), a.k);
        if (!x_first) fill_ring(0, STAGES);
        await_inputs();
    }

    const Planes x(shared + WARPS * STAGES * STAGE, a.k);
    // Loads come back in the order in which they were asked for. Where x is there when the kernel begins,
    // it waits for no weights, and weights come meanwhile.
    auto loaded = [&](u32 row) {
        if (row == 0 && x_first) fill_ring(0, STAGES - 1);
    };
    if constexpr (KIND == EXPERT_DOWN) {
        for (u32 s = 0; s < segments; ++s) {
            x.fill(s, a.x + (u64)(entry + s) * a.ldx, a.k, a.p[entry + s], loaded);
        }
    } else if constexpr (KIND == EXPERT_GATED) {
        x.fill(0, a.x + (u64)(entry / a.top_k) * a.ldx, a.k, 1.0f, loaded);
    } else {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r >= a.rows) break;
            if (a.norm) {
                x.fill_normed(r, a, norm, sums[r], loaded);
            } else {
                x.fill(r, a.x + (u64)r * a.ldx, a.k, 1.0f, loaded);
            }
        }
    }
    if (x_first) fill_ring(STAGES - 1, STAGES);
    __syncthreads();

    // Sum `lane / SPREAD` of a task.
    auto write = [&](u32 task, float sum) {
        const u32 r = lane / SPREAD / OUTPUTS, j = lane / SPREAD % OUTPUTS;
        const u32 column = Walk::first(a, task) + (IS_GATED ? j % 2 : j);
        const float up = __shfl_down_sync(FULL, sum, 2 * SPREAD);
        // Where columns are left over the last task does some of the one before again.
        if (lane % SPREAD > 0 || r >= a.rows || column < task * Walk::EACH) return;
        if (IS_GATED) {
            if (j < 2) a.out[(u64)(entry + r) * a.ldo + column] = silu(sum) * up;
        } else {
            const u32 row = EXPERTS ? blockIdx.y : r;
            a.out[(u64)row * a.ldo + column] = sum + (a.bias ? a.bias[column] : 0.0f);
        }
    };

    float acc[ROWS][OUTPUTS] = {};
    u32 slot = 0;
    bool is_begun = begin % span == 0;  // here
    for (u32 i = begin; i < end; ++i) {
        copy_wait<STAGES - 1>();
        __syncwarp();
        multiply<ROWS>(ring + slot * STAGE, x, EXPERTS ? at.segment : 0, at.chunk, acc);
        __syncwarp();
        copy_next(slot);
        if (++slot == STAGES) slot = 0;
        const u32 task = at.task;
        const bool is_last = at.advance(chunks, segments);
        if (!is_last && i + 1 < end) continue;
        float v[SUMS];
#pragma unroll
        for (int s = 0; s < SUMS; ++s) {
            v[s] = acc[s / OUTPUTS][s % OUTPUTS];
            acc[s / OUTPUTS][s % OUTPUTS] = 0.0f;
        }
        const float sum = sums_of_lanes(v);
        if (is_begun && is_last) {
            write(task, sum);
        } else if (lane % SPREAD == 0) {
            ends[warp][is_begun ? 1 : 0][lane / SPREAD] = sum;
        }
        is_begun = true;
    }
    __syncthreads();
    // A task that began in this warp, and ends in another.
    const u32 task = (end - 1) / span, task_end = (task + 1) * span;
    if (begin == end || end == task_end || begin > task * span) return;
    float sum = ends[warp][1][lane / SPREAD];
    for (u32 other = warp + 1; begin_of(other) < task_end; ++other) {
        if (begin_of(other) < begin_of(other + 1)) sum += ends[other][0][lane / SPREAD];
    }
    write(first + task, sum);
}

#define PRODUCT(NAME, ROWS, KIND)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const PackedArgs a) {      \
        product<ROWS, KIND>(a);                                                              \
    }
PRODUCT(linear_1, 1, LINEAR)
PRODUCT(linear_2, 2, LINEAR)
PRODUCT(linear_4, 4, LINEAR)
PRODUCT(gated_1, 1, GATED)
PRODUCT(gated_2, 2, GATED)
PRODUCT(gated_4, 4, GATED)
PRODUCT(expert_gated, 1, EXPERT_GATED)
PRODUCT(expert_down, 1, EXPERT_DOWN)
