// y_i = x_i / sqrt(mean_j(x_j^2) + eps) w_i, per row; statistics in f32.
//
// rms_norm       y = norm(x)
// add_rms_norm   x += r; y = norm(x)
// rms_norm_cols  `n` columns from `first` on, in place
// dt_b_c_norm    the same of three adjacent groups of columns, each with its own weight
// *_bf16         for the products of prompts in bf16 mode: y, or the normed dt, is rounded to bf16;
//                r is bf16, or f32 where the name says so
//
// Layout: x, r, y (rows, cols) f32; weights f32 vectors.
// Threads: the first two a block per row; the others a warp per row (and group), so that the
// fused one adds in the order of the other.

struct NormArgs {
    float* x;
    const float* r;
    const float* weight;
    float* y;
    u32 cols;
    float eps;
};

__device__ __forceinline__ float block_sum(float v) {
    __shared__ float sums[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f;
    return warp_sum(sum);
}

// Vectors of 4 that a thread keeps between the two passes.
#define HELD 4

template <bool ADD>
__device__ __forceinline__ void norm_row(const NormArgs& a) {
    const u64 at = (u64)blockIdx.x * a.cols;
    float* x = a.x + at;
    const float* r = ADD ? a.r + at : nullptr;
    float* y = a.y + at;
    float square = 0.0f;
    if (a.cols % 4 == 0 && a.cols <= 4 * HELD * blockDim.x) {
        float4 v[HELD], w[HELD];
#pragma unroll
        for (u32 k = 0; k < HELD; ++k) {
            const u32 c = (threadIdx.x + k * blockDim.x) * 4;
            if (c < a.cols) w[k] = *(const float4*)(a.weight + c);
        }
        await_inputs();
#pragma unroll
        for (u32 k = 0; k < HELD; ++k) {
            const u32 c = (threadIdx.x + k * blockDim.x) * 4;
            if (c >= a.cols) continue;
            v[k] = *(float4*)(x + c);
            if (ADD) {
                const float4 u = *(const float4*)(r + c);
                v[k].x += u.x, v[k].y += u.y, v[k].z += u.z, v[k].w += u.w;
                *(float4*)(x + c) = v[k];
            }
            square += squares(v[k]);
        }
        const float scale = rsqrtf(block_sum(square) / a.cols + a.eps);
#pragma unroll
        for (u32 k = 0; k < HELD; ++k) {
            const u32 c = (threadIdx.x + k * blockDim.x) * 4;
            if (c >= a.cols) continue;
            *(float4*)(y + c) = make_float4(v[k].x * scale * w[k].x, v[k].y * scale * w[k].y,
                                            v[k].z * scale * w[k].z, v[k].w * scale * w[k].w);
        }
    } else {
        await_inputs();
        for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) {
            float v = x[c];
            if (ADD) x[c] = v += r[c];
            square += v * v;
        }
        const float scale = rsqrtf(block_sum(square) / a.cols + a.eps);
        for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) y[c] = x[c] * scale * a.weight[c];
    }
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const NormArgs a) {
    let_next_begin();
    norm_row<false>(a);
}
extern "C" __global__ void __launch_bounds__(1024) add_rms_norm(const NormArgs a) {
    let_next_begin();
    norm_row<true>(a);
}

struct NormColsArgs {
    float* x;
    const float* weight[3];
    u32 rows, cols, first;
    u32 n[3];
    float eps;
};

__device__ __forceinline__ void norm_in_warp(float* x, const float* weight, u32 n, float eps) {
    const u32 lane = threadIdx.x % 32;
    float square = 0.0f;
    for (u32 i = lane; i < n; i += 32) square += x[i] * x[i];
    const float scale = rsqrtf(warp_sum(square) / n + eps);
    for (u32 i = lane; i < n; i += 32) x[i] = x[i] * scale * weight[i];
}

extern "C" __global__ void __launch_bounds__(128) rms_norm_cols(const NormColsArgs a) {
    let_next_begin();
    await_inputs();
    const u64 row = (u64)blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= a.rows) return;
    norm_in_warp(a.x + row * a.cols + a.first, a.weight[0], a.n[0], a.eps);
}

extern "C" __global__ void __launch_bounds__(384) dt_b_c_norm(const NormColsArgs a) {
    let_next_begin();
    await_inputs();
    const u32 warp = threadIdx.x / 32;
    const u64 row = (u64)blockIdx.x * 4 + warp / 3;
    if (row >= a.rows) return;
    float* x = a.x + row * a.cols + a.first;
    switch (warp % 3) {
        case 0: return norm_in_warp(x, a.weight[0], a.n[0], a.eps);
        case 1: return norm_in_warp(x + a.n[0], a.weight[1], a.n[1], a.eps);
        case 2: return norm_in_warp(x + a.n[0] + a.n[1], a.weight[2], a.n[2], a.eps);
    }
}

#if BF16
// Vectors of 4 that a thread keeps between the two passes: up to 8192 columns.
#define KEPT 8

struct NormBf16Args {
    float* x;
    const void* r;
    const float* weight;
    bf16* y;
    u32 cols;
    float eps;
};

__device__ __forceinline__ float4 load_4(const float* p) { return *(const float4*)p; }
__device__ __forceinline__ float4 load_4(const bf16* p) {
    const uint2 v = *(const uint2*)p;
    return make_float4(low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y));
}

// Columns a multiple of 4.
template <bool ADD, typename R>
__device__ __forceinline__ void norm_row_bf16(const NormBf16Args& a) {
    const u64 at = (u64)blockIdx.x * a.cols;
    float* x = a.x + at;
    float4 v[KEPT];
    float square = 0.0f;
#pragma unroll
    for (u32 k = 0; k < KEPT; ++k) {
        const u32 c = (threadIdx.x + k * 256) * 4;
        if (c >= a.cols) continue;
        v[k] = load_4(x + c);
        if (ADD) {
            const float4 r = load_4((const R*)a.r + at + c);
            v[k].x += r.x, v[k].y += r.y, v[k].z += r.z, v[k].w += r.w;
            *(float4*)(x + c) = v[k];
        }
        square += v[k].x * v[k].x + v[k].y * v[k].y + v[k].z * v[k].z + v[k].w * v[k].w;
    }
    const float scale = rsqrtf(block_sum(square) / a.cols + a.eps);
#pragma unroll
    for (u32 k = 0; k < KEPT; ++k) {
        const u32 c = (threadIdx.x + k * 256) * 4;
        if (c >= a.cols) continue;
        const float4 w = load_4(a.weight + c);
        *(uint2*)(a.y + at + c) = make_uint2(pack_bf16(v[k].x * scale * w.x, v[k].y * scale * w.y),
                                             pack_bf16(v[k].z * scale * w.z, v[k].w * scale * w.w));
    }
}

extern "C" __global__ void __launch_bounds__(256) rms_norm_bf16(const NormBf16Args a) {
    norm_row_bf16<false, float>(a);
}
extern "C" __global__ void __launch_bounds__(256) add_rms_norm_bf16(const NormBf16Args a) {
    norm_row_bf16<true, bf16>(a);
}
extern "C" __global__ void __launch_bounds__(256) add_f32_rms_norm_bf16(const NormBf16Args a) {
    norm_row_bf16<true, float>(a);
}

struct NormColsBf16Args {
    NormColsArgs cols;
    bf16* dt;  // (rows, ldt), zeros beyond the columns of dt
    u32 ldt;
};

extern "C" __global__ void __launch_bounds__(384) dt_b_c_norm_bf16(const NormColsBf16Args args) {
    const NormColsArgs& a = args.cols;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 row = (u64)blockIdx.x * 4 + warp / 3;
    if (row >= a.rows) return;
    float* x = a.x + row * a.cols;
    if (warp % 3 == 1) return norm_in_warp(x + a.n[0], a.weight[1], a.n[1], a.eps);
    if (warp % 3 == 2) return norm_in_warp(x + a.n[0] + a.n[1], a.weight[2], a.n[2], a.eps);
    float square = 0.0f;
    for (u32 i = lane; i < a.n[0]; i += 32) square += x[i] * x[i];
    const float scale = rsqrtf(warp_sum(square) / a.n[0] + a.eps);
    for (u32 i = lane; i < args.ldt; i += 32) {
        args.dt[row * args.ldt + i] = i < a.n[0] ? to_bf16(x[i] * scale * a.weight[0][i]) : 0;
    }
}
#endif
