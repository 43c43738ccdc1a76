// The selective scan of a decode step: one token in each run. The equations are those of scan.cu.
//
// selective_scan_step_GROUP  the scan, from dt before bias and softplus, and normed B and C
// dt_scan_step_GROUP         all between x_proj and out_proj: the norms of dt, B and C, dt_proj and
//                            the scan. With x_dbl = [dt | B | C] as x_proj gives it:
//
//   dt = softplus(W norm(dt) + dt_bias)      B = norm(B)      C = norm(C)
//
// Layout: x, z, dt, b, c, x_dbl (tokens, ...) f32, each with the stride of the tensor it is part
// of; W (d_inner, ldw) weight_t, zeros beyond DT_RANK; A (d_inner, D_STATE), state (slots, d_inner,
// D_STATE) f32; y (tokens, d_inner).
// Threads: LANES threads per channel, each with STATES consecutive elements of h; CHANNELS channels
// and up to GROUP tokens per block. The rows of A and W stay in registers for all tokens, a state is
// read and written once. The vectors that all channels share are in shared memory. In bf16, and with
// 4 lanes, 8 tokens are what a tensor core multiplies at once: a warp has 8 channels, its W is the
// left operand as it was loaded (both operands take the sum in the same other order), and the
// normed dt is rounded to bf16.
// Constraints: LANES STATES >= D_STATE. DT_RANK is 0 where dt_proj is not made for (scan_step.rs).

#define THREADS 128
#define CHANNELS (THREADS / LANES)
#define PADDED (LANES * STATES)
#define IS_VECTOR (STATES % 4 == 0 && PADDED == D_STATE)

struct StepArgs {
    const float *x, *z;
    const float *dt, *b, *c;  // of x_dbl, where they are not normed yet
    const float *a, *d, *dt_bias;
    float *state, *y;
    const Run* runs;  // token t is that of run t
    const float* norms[3];  // weights of dt, B and C
    const weight_t* dt_proj;
    u32 count, d_inner;
    u32 ldx, ldz, lddt, ldb, ldc, ldw;
    float eps;
};

__device__ __forceinline__ u64 state_at(const StepArgs& a, u32 slot, u32 channel, u32 lane) {
    return ((u64)slot * a.d_inner + channel) * D_STATE + lane * STATES;
}

// STATES values; zeros beyond D_STATE and where `valid` is false.
__device__ __forceinline__ void load_states(float (&to)[STATES], const float* from, u32 lane,
                                            bool valid) {
#if IS_VECTOR
#pragma unroll
    for (int n = 0; n < STATES; n += 4) {
        const float4 v = valid ? *(const float4*)(from + n) : make_float4(0, 0, 0, 0);
        to[n] = v.x, to[n + 1] = v.y, to[n + 2] = v.z, to[n + 3] = v.w;
    }
#else
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        to[n] = valid && lane * STATES + n < D_STATE ? from[n] : 0.0f;
    }
#endif
}

__device__ __forceinline__ void store_states(float* to, const float (&from)[STATES], u32 lane) {
#if IS_VECTOR
#pragma unroll
    for (int n = 0; n < STATES; n += 4) {
        *(float4*)(to + n) = make_float4(from[n], from[n + 1], from[n + 2], from[n + 3]);
    }
#else
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        if (lane * STATES + n < D_STATE) to[n] = from[n];
    }
#endif
}

// The sum over the lanes of a channel, in all of them.
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask >>= 1) v += __shfl_xor_sync(FULL, v, mask);
    return v;
}

// n values of a row to shared memory, by a warp; zeros up to `padded`.
template <bool NORM, typename T>
__device__ __forceinline__ void take(T* to, const float* row, const float* weight, u32 n,
                                     u32 padded, float eps) {
    const u32 lane = threadIdx.x % 32;
    float scale = 1.0f;
    if (NORM) {
        float square = 0.0f;
        for (u32 i = lane; i < n; i += 32) square += row[i] * row[i];
        scale = rsqrtf(warp_sum(square) / n + eps);
    }
    for (u32 i = lane; i < padded; i += 32) {
        narrow(i < n ? (NORM ? row[i] * scale * weight[i] : row[i]) : 0.0f, to[i]);
    }
}

#if DT_RANK > 0
// 16 bytes of W for each lane of a channel, so many times.
#define CHUNKS ((DT_RANK + LANES * WEIGHT_VECTOR - 1) / (LANES * WEIGHT_VECTOR))
#define DT_PADDED (CHUNKS * LANES * WEIGHT_VECTOR)
#else
#define CHUNKS 1
#define DT_PADDED 4
#endif
#define HAS_TENSOR (BF16 && LANES == 4)
// Of rounded rows: two of them lie 64 bytes apart in the banks.
#define DT_PITCH (DT_PADDED + (CHUNKS % 2 == 0 ? 32 : 0))

template <int GROUP, bool DT_PROJ>
__device__ __forceinline__ void scan_step(const StepArgs& a) {
    constexpr bool TENSOR = HAS_TENSOR && DT_PROJ && GROUP == 8;
    __shared__ __align__(16) float dt[DT_PROJ && !TENSOR ? GROUP : 1][DT_PADDED];
    __shared__ __align__(16) bf16 rounded[TENSOR ? GROUP : 1][DT_PITCH];
    __shared__ __align__(16) float b[GROUP][PADDED], c[GROUP][PADDED];
    const u32 own = threadIdx.x / LANES, lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
    const u32 i = blockIdx.x * CHANNELS + own, first = blockIdx.y * GROUP;
    const u32 count = min(a.count - first, (u32)GROUP);
    const bool active = i < a.d_inner;
    let_next_begin();

    // What no kernel of a step writes, and where the states are, which come closer meanwhile.
    float rate[STATES];
    load_states(rate, a.a + (u64)i * D_STATE + lane * STATES, lane, active);
#pragma unroll
    for (int n = 0; n < STATES; ++n) rate[n] *= A_UNIT;
    const float bias = active ? a.dt_bias[i] : 0.0f, skip = active ? a.d[i] : 0.0f;
    uint4 w[CHUNKS];
    if constexpr (DT_PROJ) {
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const u32 at = (k * LANES + lane) * WEIGHT_VECTOR;
            const bool valid = active && at < a.ldw;
            w[k] = valid ? load_streaming(a.dt_proj + (u64)i * a.ldw + at) : make_uint4(0, 0, 0, 0);
        }
    }
    u32 slot[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
        slot[t] = a.runs[first + min((u32)t, count - 1)].slot;
        if (active && (u32)t < count) prefetch_l2(a.state + state_at(a, slot[t], i, lane));
    }
    await_inputs();

    float h[GROUP][STATES], x[GROUP], z[GROUP], raw[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
        const bool valid = active && (u32)t < count;
        const u64 row = first + t;
        load_states(h[t], a.state + state_at(a, slot[t], i, lane), lane, valid);
        x[t] = valid ? a.x[row * a.ldx + i] : 0.0f;
        z[t] = valid ? a.z[row * a.ldz + i] : 0.0f;
        raw[t] = !DT_PROJ && valid ? a.dt[row * a.lddt + i] : 0.0f;
    }
    // A warp takes every fourth vector of the group.
    for (u32 k = warp; k < (DT_PROJ ? 3 : 2) * count; k += THREADS / 32) {
        const u32 t = k % count;
        const u64 row = first + t;
        switch (k / count) {
            case 0: take<DT_PROJ>(b[t], a.b + row * a.ldb, a.norms[1], D_STATE, PADDED, a.eps); break;
            case 1: take<DT_PROJ>(c[t], a.c + row * a.ldc, a.norms[2], D_STATE, PADDED, a.eps); break;
            case 2:
                if constexpr (TENSOR) {
                    take<true>(rounded[t], a.dt + row * a.lddt, a.norms[0], DT_RANK, DT_PADDED, a.eps);
                } else if constexpr (DT_PROJ) {
                    take<true>(dt[t], a.dt + row * a.lddt, a.norms[0], DT_RANK, DT_PADDED, a.eps);
                }
        }
    }
    if constexpr (TENSOR) {
        // Rows without a token, whose products nobody reads, but which are to be numbers.
        for (u32 k = threadIdx.x + count * DT_PITCH; k < GROUP * DT_PITCH; k += THREADS) {
            rounded[0][k] = 0;
        }
    }
    __syncthreads();
    if constexpr (TENSOR) {
        float product[4] = {};  // of this channel, tokens 2 lane and 2 lane + 1; of none
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const u32 row = threadIdx.x % 32 / 4;
            const uint4 v = *(const uint4*)&rounded[row][(k * LANES + lane) * WEIGHT_VECTOR];
            mma_bf16(product, {w[k].x, 0, w[k].y, 0}, v.x, v.y);
            mma_bf16(product, {w[k].z, 0, w[k].w, 0}, v.z, v.w);
        }
#pragma unroll
        for (int t = 0; t < GROUP; ++t) {
            raw[t] = __shfl_sync(FULL, product[t % 2], threadIdx.x % 32 / 4 * 4 + t / 2);
        }
    }

#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
        if ((u32)t >= count) break;
        if constexpr (DT_PROJ && !TENSOR) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < CHUNKS; ++k) {
                float wide[WEIGHT_VECTOR];
                widen_16(w[k], wide);
                const float* in = &dt[t][(k * LANES + lane) * WEIGHT_VECTOR];
#pragma unroll
                for (int v = 0; v < WEIGHT_VECTOR; v += 4) {
                    const float4 u = *(const float4*)(in + v);
                    sum += u.x * wide[v] + u.y * wide[v + 1] + u.z * wide[v + 2] + u.w * wide[v + 3];
                }
            }
            raw[t] = lanes_sum(sum);
        }
        const float step = step_size(raw[t] + bias), step_x = step * x[t];
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < STATES; ++n) {
            h[t][n] = decay(step * rate[n]) * h[t][n] + step_x * b[t][lane * STATES + n];
            sum += c[t][lane * STATES + n] * h[t][n];
        }
        sum = lanes_sum(sum);
        if (!active) continue;
        store_states(a.state + state_at(a, slot[t], i, lane), h[t], lane);
        if (lane == 0) a.y[(u64)(first + t) * a.d_inner + i] = (sum + skip * x[t]) * gate(z[t]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_step_1(const StepArgs a) {
    scan_step<1, false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_step_4(const StepArgs a) {
    scan_step<4, false>(a);
}
#if DT_RANK > 0
extern "C" __global__ void __launch_bounds__(THREADS) dt_scan_step_1(const StepArgs a) {
    scan_step<1, true>(a);
}
#if HAS_TENSOR
extern "C" __global__ void __launch_bounds__(THREADS) dt_scan_step_8(const StepArgs a) {
    scan_step<8, true>(a);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS) dt_scan_step_4(const StepArgs a) {
    scan_step<4, true>(a);
}
#endif
#endif
