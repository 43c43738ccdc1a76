// index[r] = the column of the largest x[r]; of equal ones the lowest. A NaN is never the
// largest; a row of nothing but NaN gives 0.
//
// Layout: x (rows, cols) f32, index (rows) u32.
// Threads: a block per row.

struct ArgmaxArgs {
    const float* x;
    u32* index;
    u32 cols;
};

__device__ __forceinline__ void keep_better(float& value, u32& at, float other, u32 other_at) {
    if (other > value || (other == value && other_at < at)) value = other, at = other_at;
}

extern "C" __global__ void __launch_bounds__(512) argmax(const ArgmaxArgs a) {
    __shared__ float values[16];
    __shared__ u32 places[16];
    const float* row = a.x + (u64)blockIdx.x * a.cols;
    float value = -INFINITY_F;
    u32 at = FULL;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) keep_better(value, at, row[c], c);
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        keep_better(value, at, __shfl_xor_sync(FULL, value, mask), __shfl_xor_sync(FULL, at, mask));
    }
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, places[threadIdx.x / 32] = at;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < blockDim.x / 32; ++w) keep_better(value, at, values[w], places[w]);
        a.index[blockIdx.x] = at == FULL ? 0 : at;
    }
}
