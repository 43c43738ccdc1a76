// The selective scan (arXiv 2312.00752, equations 2a and 2b). Per token t and channel i, with h_i
// of D_STATE elements continuing from the state:
//
//   dt   = softplus(dt[t, i] + dt_bias[i])
//   h[n] = exp(dt A[i, n]) h[n] + dt B[t, n] x[t, i]
//   y    = (sum_n C[t, n] h[n] + D[i] x[t, i]) silu(z[t, i])
//
// Layout: x, dt, z (tokens, d_inner) and b, c (tokens, D_STATE) f32, each with the stride of the
// tensor it is part of; A (d_inner, D_STATE), state (slots, d_inner, D_STATE) f32;
// y (tokens, d_inner).
// Elements of x, dt, z and y are f32, or bf16 in the fused prompts of bf16 mode.
// Threads: LANES threads per channel, each with STATES consecutive elements of h in registers;
// CHANNELS channels per block; a block walks over the tokens of one run, CHUNK at a time. Between
// two barriers all threads, whose work on different chunks overlaps,
//   1. start to copy the operands of the chunk after the next to shared memory (cp.async);
//   2. make the pairs (softplus(dt + dt_bias), that times x) of the next chunk;
//   3. scan the chunk. Every LANES tokens the threads of a channel add their parts of C . h such
//      that each ends with the sum of one token: LANES - 1 shuffles instead of LANES log2(LANES);
//   4. finish y of the chunk before and write it, rows of CHANNELS values at once.
// A tail of the chunk is filled with dt = 0 and x = 0, which leaves h as it is. Where a run is
// cut does not change one bit of the result.
// Constraints: LANES = 2^LOG_LANES up to 32, LANES STATES >= D_STATE; shared memory of
// sizeof(Shared) is given at launch. selective_scan_aligned: d_inner, D_STATE and all strides are
// multiples of 4, all operands aligned to 16 bytes; selective_scan_bf16: of 8 where they are bf16.

#define CHUNK 32
#define LANES (1 << LOG_LANES)
// Four warps where that is 8 to 32 channels.
#define CHANNELS (LANES > 16 ? 8 : LANES < 4 ? 32 : 128 / LANES)
#define THREADS (CHANNELS * LANES)
#define PADDED (LANES * STATES)

struct ScanArgs {
    const void *x, *dt, *z;
    const float *b, *c;
    const float *a, *d, *dt_bias;
    float* state;
    void* y;
    const Run* runs;
    u32 d_inner, blocks;  // blocks: of channels
    u32 ldx, lddt, ldz, ldb, ldc;
};

template <typename T>
struct Shared {
    // Of four chunks: finished, scanned, prepared, copied.
    T x[4][CHUNK][CHANNELS], dt[4][CHUNK][CHANNELS], z[4][CHUNK][CHANNELS];
    float b[2][CHUNK][PADDED], c[2][CHUNK][PADDED];
    float2 steps[2][CHUNK][CHANNELS];
    float sums[2][CHUNK][CHANNELS + 1];
};

// Neighbours at once.
__device__ __forceinline__ void store(const float (&v)[1], float* to) { *to = v[0]; }
__device__ __forceinline__ void store(const float (&v)[1], bf16* to) { *to = to_bf16(v[0]); }
__device__ __forceinline__ void store(const float (&v)[2], float* to) {
    *(float2*)to = make_float2(v[0], v[1]);
}
__device__ __forceinline__ void store(const float (&v)[2], bf16* to) {
    *(u32*)to = pack_bf16(v[0], v[1]);
}

// Copies WIDTH values in the background; zeros where `valid` is false.
template <int WIDTH, typename T>
__device__ __forceinline__ void copy(T* to, const T* from, u64 at, bool valid) {
    // Nothing is read where it is not valid.
    if (WIDTH * sizeof(T) == 16) copy_async_16(to, from + at, valid);
    else copy_async_4(to, from + at, valid);
}

// A thread's part of the copies of an operand, one chunk of tokens after the other: WIDTH values
// at a time of COLS columns, of which `cols` are there.
template <int WIDTH, int COLS, typename T>
struct Copies {
    // Rows between two copies of a thread, which are of the same columns if that is whole.
    static constexpr u32 STEP = THREADS * WIDTH / COLS;
    static constexpr bool WHOLE = THREADS * WIDTH % COLS == 0;
    const T* from;
    u32 ld, cols;

    __device__ Copies(const void* operand, u32 ld, u32 start, u32 first, u32 cols)
        : from((const T*)operand + (u64)start * ld + first), ld(ld), cols(cols) {
        if (WHOLE) from += (u64)(threadIdx.x * WIDTH / COLS) * ld + threadIdx.x * WIDTH % COLS;
    }

    // Starts to copy the next chunk, of which `len` tokens are there; zeros after them.
    __device__ void next(T (*to)[COLS], u32 len) {
        if (WHOLE) {
            const u32 row = threadIdx.x * WIDTH / COLS, c = threadIdx.x * WIDTH % COLS;
            const T* at = from;
#pragma unroll
            for (u32 t = 0; t < CHUNK; t += STEP, at += (u64)STEP * ld) {
                if (STEP <= CHUNK || row < CHUNK) {
                    copy<WIDTH>(&to[row + t][c], from, at - from, row + t < len && c < cols);
                }
            }
        } else {
            for (u32 k = threadIdx.x * WIDTH; k < CHUNK * COLS; k += THREADS * WIDTH) {
                const u32 t = k / COLS, c = k % COLS;
                copy<WIDTH>(&to[t][c], from, (u64)t * ld + c, t < len && c < cols);
            }
        }
        from += (u64)CHUNK * ld;
    }
};

// WIDTH elements of x, dt and z, and NARROW of B and C, are copied at a time.
template <typename T, int WIDTH, int NARROW>
__device__ __forceinline__ void scan(const ScanArgs& a) {
    // Elements that a thread prepares and finishes at a time, in one row; always of one column.
    constexpr u32 OWN = WIDTH == 1 || LANES > 16 ? 1 : 2, ROW = CHANNELS / OWN;
    constexpr u32 ROUND = THREADS / ROW, ROUNDS = CHUNK / ROUND;
    static_assert(ROUNDS > 0, "every thread has something to prepare");
    extern __shared__ __align__(16) unsigned char memory[];
    Shared<T>& s = *(Shared<T>*)memory;
    const Run run = a.runs[blockIdx.x / a.blocks];
    if (run.len == 0) return;
    const u32 channel = blockIdx.x % a.blocks * CHANNELS;  // first of the block
    const u32 own = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const u32 i = channel + own;
    const bool active = i < a.d_inner;

    float h[STATES], rate[STATES];
    float* state = a.state + ((u64)run.slot * a.d_inner + i) * D_STATE + lane * STATES;
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        const bool valid = active && lane * STATES + n < D_STATE;
        h[n] = valid ? state[n] : 0.0f;
        rate[n] = valid ? a.a[(u64)i * D_STATE + lane * STATES + n] * A_UNIT : 0.0f;
    }
    const u32 col = threadIdx.x % ROW * OWN, row = threadIdx.x / ROW;
    const bool col_active = channel + col < a.d_inner;
    float bias[OWN], skip[OWN];
#pragma unroll
    for (u32 j = 0; j < OWN; ++j) {
        bias[j] = col_active ? a.dt_bias[channel + col + j] : 0.0f;
        skip[j] = col_active ? a.d[channel + col + j] : 0.0f;
    }

    const u32 chunks = (run.len + CHUNK - 1) / CHUNK;
    const u32 columns = a.d_inner - channel;
    Copies<WIDTH, CHANNELS, T> x(a.x, a.ldx, run.start, channel, columns);
    Copies<WIDTH, CHANNELS, T> dt(a.dt, a.lddt, run.start, channel, columns);
    Copies<WIDTH, CHANNELS, T> z(a.z, a.ldz, run.start, channel, columns);
    Copies<NARROW, PADDED, float> b(a.b, a.ldb, run.start, 0, D_STATE);
    Copies<NARROW, PADDED, float> c(a.c, a.ldc, run.start, 0, D_STATE);
    auto fetch_inputs = [&](u32 chunk) {
        const u32 len = run.len - chunk * CHUNK;
        x.next(s.x[chunk % 4], len);
        dt.next(s.dt[chunk % 4], len);
        z.next(s.z[chunk % 4], len);
    };
    auto fetch_states = [&](u32 chunk) {
        const u32 len = run.len - chunk * CHUNK;
        b.next(s.b[chunk % 2], len);
        c.next(s.c[chunk % 2], len);
    };
    T* const y_own = (T*)a.y + (u64)(run.start + row) * a.d_inner + channel + col;
    auto prepare = [&](u32 chunk) {
        const u32 len = run.len - chunk * CHUNK;
#pragma unroll
        for (u32 k = 0; k < ROUNDS; ++k) {
            const u32 t = row + k * ROUND;
            // Beyond the end dt is the bias alone. A product, as a condition would be a branch.
            const float within = t < len ? 1.0f : 0.0f;
            float2 step[OWN];
#pragma unroll
            for (u32 j = 0; j < OWN; ++j) {
                const float dt = widen(s.dt[chunk % 4][t][col + j]);
                const float v = within * step_size(dt + bias[j]);
                step[j] = make_float2(v, v * widen(s.x[chunk % 4][t][col + j]));
            }
#pragma unroll
            for (u32 j = 0; j < OWN; ++j) s.steps[chunk % 2][t][col + j] = step[j];
        }
    };
    auto finish = [&](u32 chunk) {
        const u32 len = run.len - chunk * CHUNK;
        T* to = y_own + (u64)chunk * CHUNK * a.d_inner;
#pragma unroll
        for (u32 k = 0; k < ROUNDS; ++k, to += (u64)ROUND * a.d_inner) {
            const u32 t = row + k * ROUND;
            float y[OWN];
#pragma unroll
            for (u32 j = 0; j < OWN; ++j) {
                const float x = widen(s.x[chunk % 4][t][col + j]);
                const float z = widen(s.z[chunk % 4][t][col + j]);
                y[j] = (s.sums[chunk % 2][t][col + j] + skip[j] * x) * gate(z);
            }
            if (t < len && col_active) store(y, to);
        }
    };

    fetch_inputs(0);
    copy_commit();
    if (chunks > 1) fetch_inputs(1);
    fetch_states(0);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    prepare(0);
    for (u32 chunk = 0; chunk < chunks; ++chunk) {
        copy_wait<0>();
        __syncthreads();
        if (chunk + 2 < chunks) fetch_inputs(chunk + 2);
        if (chunk + 1 < chunks) fetch_states(chunk + 1);
        copy_commit();
        if (chunk + 1 < chunks) prepare(chunk + 1);
        if (chunk > 0) finish(chunk - 1);

        const u32 len = min(run.len - chunk * CHUNK, (u32)CHUNK);
        for (u32 t = 0; t < len; t += LANES) {
            float part[LANES];
#pragma unroll
            for (int k = 0; k < LANES; ++k) {
                const float2 step = s.steps[chunk % 2][t + k][own];
                const float* b = &s.b[chunk % 2][t + k][lane * STATES];
                const float* c = &s.c[chunk % 2][t + k][lane * STATES];
                part[k] = 0.0f;
#pragma unroll
                for (int n = 0; n < STATES; ++n) {
                    h[n] = decay(step.x * rate[n]) * h[n] + step.y * b[n];
                    part[k] += c[n] * h[n];
                }
            }
#pragma unroll
            for (int step = 0; step < LOG_LANES; ++step) {
                const int half = LANES >> (step + 1);
                const bool upper = lane & half;
#pragma unroll
                for (int k = 0; k < half; ++k) {
                    const float give = upper ? part[k] : part[k + half];
                    const float keep = upper ? part[k + half] : part[k];
                    part[k] = keep + __shfl_xor_sync(FULL, give, half);
                }
            }
            s.sums[chunk % 2][t + lane][own] = part[0];
        }
    }
    __syncthreads();
    finish(chunks - 1);
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        if (active && lane * STATES + n < D_STATE) state[n] = h[n];
    }
}

#define SCAN(NAME, T, WIDTH, NARROW)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) NAME(const ScanArgs a) { \
        let_next_begin();                                                                  \
        await_inputs();                                                                    \
        scan<T, WIDTH, NARROW>(a);                                                         \
    }
SCAN(selective_scan, float, 1, 1)
SCAN(selective_scan_aligned, float, 4, 4)
#if BF16
SCAN(selective_scan_bf16, bf16, 8, 4)
#endif
