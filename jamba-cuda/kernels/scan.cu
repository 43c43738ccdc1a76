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
// Threads: LANES threads per channel, each with STATES consecutive elements of h in registers;
// CHANNELS channels per block; a block walks over the tokens of one run, CHUNK at a time:
//   1. the next chunk of all operands is on its way to shared memory (cp.async);
//   2. all threads make the pairs (softplus(dt + dt_bias), that times x);
//   3. the scan. Every LANES tokens the threads of a channel add their parts of C . h such that
//      each ends with the sum of one token: LANES - 1 shuffles instead of LANES log2(LANES);
//   4. all threads finish y and write it, rows of CHANNELS values at once.
// A tail of the chunk is filled with dt = 0 and x = 0, which leaves h as it is. Where a run is
// cut does not change one bit of the result.
// Constraints: LANES = 2^LOG_LANES up to 32, LANES STATES >= D_STATE; shared memory of
// sizeof(Shared) is given at launch. selective_scan_aligned: d_inner, D_STATE and all strides are
// multiples of 4, all operands aligned to 16 bytes.

#define CHUNK 32
#define LANES (1 << LOG_LANES)
// Four warps where that is 8 to 32 channels.
#define CHANNELS (LANES > 16 ? 8 : LANES < 4 ? 32 : 128 / LANES)
#define THREADS (CHANNELS * LANES)
#define PADDED (LANES * STATES)
#define OWN (CHUNK / LANES)

struct ScanArgs {
    const float *x, *dt, *z, *b, *c;
    const float *a, *d, *dt_bias;
    float *state, *y;
    const Run* runs;
    u32 d_inner, blocks;  // blocks: of channels
    u32 ldx, lddt, ldz, ldb, ldc;
};

struct Chunk {
    float x[CHUNK][CHANNELS], dt[CHUNK][CHANNELS], z[CHUNK][CHANNELS];
    float b[CHUNK][PADDED], c[CHUNK][PADDED];
};

struct Shared {
    Chunk chunks[2];
    float2 steps[CHUNK][CHANNELS];
    float sums[CHUNK][CHANNELS + 1];
};

// Copies WIDTH values in the background; zeros where `valid` is false.
template <int WIDTH>
__device__ __forceinline__ void copy(float* to, const float* from, u64 at, bool valid) {
    if (WIDTH == 4) copy_async_16(to, from + (valid ? at : 0), valid);
    else copy_async_4(to, from + (valid ? at : 0), valid);
}

// Starts to copy tokens first .. first + CHUNK of the run; zeros after its end.
template <int WIDTH>
__device__ __forceinline__ void fetch(Chunk& to, const ScanArgs& a, const Run& run, u32 channel,
                                      u32 first) {
    for (u32 k = threadIdx.x * WIDTH; k < CHUNK * CHANNELS; k += THREADS * WIDTH) {
        const u32 t = k / CHANNELS, c = k % CHANNELS;
        const bool valid = first + t < run.len && channel + c < a.d_inner;
        const u64 row = run.start + first + t;
        copy<WIDTH>(&to.x[t][c], a.x, row * a.ldx + channel + c, valid);
        copy<WIDTH>(&to.dt[t][c], a.dt, row * a.lddt + channel + c, valid);
        copy<WIDTH>(&to.z[t][c], a.z, row * a.ldz + channel + c, valid);
    }
    for (u32 k = threadIdx.x * WIDTH; k < CHUNK * PADDED; k += THREADS * WIDTH) {
        const u32 t = k / PADDED, n = k % PADDED;
        const bool valid = first + t < run.len && n < D_STATE;
        const u64 row = run.start + first + t;
        copy<WIDTH>(&to.b[t][n], a.b, row * a.ldb + n, valid);
        copy<WIDTH>(&to.c[t][n], a.c, row * a.ldc + n, valid);
    }
}

template <int WIDTH>
__device__ __forceinline__ void scan(const ScanArgs& a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    auto& chunks = shared.chunks;
    auto& steps = shared.steps;
    auto& sums = shared.sums;
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
    // This thread prepares and finishes OWN elements of a chunk, all of one channel.
    const u32 col = threadIdx.x % CHANNELS, row = threadIdx.x / CHANNELS;
    const bool col_active = channel + col < a.d_inner;
    const float bias = col_active ? a.dt_bias[channel + col] : 0.0f;
    const float skip = col_active ? a.d[channel + col] : 0.0f;

    fetch<WIDTH>(chunks[0], a, run, channel, 0);
    copy_commit();
    for (u32 first = 0; first < run.len; first += CHUNK) {
        Chunk& chunk = chunks[first / CHUNK % 2];
        if (first + CHUNK < run.len) {
            fetch<WIDTH>(chunks[(first / CHUNK + 1) % 2], a, run, channel, first + CHUNK);
        }
        copy_commit();
        copy_wait<1>();
        __syncthreads();

        const u32 len = min(run.len - first, (u32)CHUNK);
        // All loads before the first store, so that the elements overlap.
        float x[OWN], v[OWN], sum[OWN];
#pragma unroll
        for (u32 k = 0; k < OWN; ++k) {
            x[k] = chunk.x[row + k * LANES][col], v[k] = chunk.dt[row + k * LANES][col];
        }
#pragma unroll
        for (u32 k = 0; k < OWN; ++k) {
            // Beyond the end dt is the bias alone. A product, as a condition would be a branch.
            const float within = row + k * LANES < len ? 1.0f : 0.0f;
            v[k] = within * step_size(v[k] + bias);
        }
#pragma unroll
        for (u32 k = 0; k < OWN; ++k) {
            steps[row + k * LANES][col] = make_float2(v[k], v[k] * x[k]);
        }
        __syncthreads();

        for (u32 t = 0; t < len; t += LANES) {
            float part[LANES];
#pragma unroll
            for (int k = 0; k < LANES; ++k) {
                const float2 step = steps[t + k][own];
                const float* b = &chunk.b[t + k][lane * STATES];
                const float* c = &chunk.c[t + k][lane * STATES];
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
            sums[t + lane][own] = part[0];
        }
        __syncthreads();

#pragma unroll
        for (u32 k = 0; k < OWN; ++k) {
            sum[k] = sums[row + k * LANES][col], v[k] = chunk.z[row + k * LANES][col];
        }
#pragma unroll
        for (u32 k = 0; k < OWN; ++k) {
            if (row + k * LANES < len && col_active) {
                const u64 t = run.start + first + row + k * LANES;
                a.y[t * a.d_inner + channel + col] = (sum[k] + skip * x[k]) * gate(v[k]);
            }
        }
        // The next round refills this chunk and overwrites steps and sums.
        __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        if (active && lane * STATES + n < D_STATE) state[n] = h[n];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) selective_scan(const ScanArgs a) {
    let_next_begin();
    await_inputs();
    scan<1>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) selective_scan_aligned(const ScanArgs a) {
    let_next_begin();
    await_inputs();
    scan<4>(a);
}
