// chosen[r] = { the column of the largest x[r], of equal ones the lowest;
//               x[r][column] - log(sum over c of exp(x[r][c])) }
// A row with a value that is not finite gives the column FULL.
//
// Layout: x (rows, cols) f32, chosen (rows).
// Threads: a block per row. The row is read twice; the second time it comes from the L2 cache.

struct Chosen {
    u32 id;
    float logprob;
};

struct GreedyArgs {
    const float* x;
    Chosen* chosen;
    u32 cols;
};

#define WARPS 32

__device__ __forceinline__ void keep_better(float& value, u32& at, float other, u32 other_at) {
    if (other > value || (other == value && other_at < at)) value = other, at = other_at;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) greedy(const GreedyArgs a) {
    let_next_begin();
    await_inputs();
    __shared__ float values[WARPS];
    __shared__ u32 places[WARPS];
    const float* row = a.x + (u64)blockIdx.x * a.cols;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float value = -INFINITY_F;
    u32 at = FULL;
    int unusable = 0;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) {
        unusable |= !(fabsf(row[c]) < INFINITY_F);
        keep_better(value, at, row[c], c);
    }
    if (__syncthreads_or(unusable)) {
        if (threadIdx.x == 0) a.chosen[blockIdx.x] = Chosen{FULL, 0.0f};
        return;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        keep_better(value, at, __shfl_xor_sync(FULL, value, mask), __shfl_xor_sync(FULL, at, mask));
    }
    if (lane == 0) values[warp] = value, places[warp] = at;
    __syncthreads();
    value = values[0], at = places[0];
    for (u32 w = 1; w < WARPS; ++w) keep_better(value, at, values[w], places[w]);
    __syncthreads();  // before `values` is used again

    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) sum += expf(row[c] - value);
    sum = warp_sum(sum);
    if (lane == 0) values[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.0f;
        for (u32 w = 0; w < WARPS; ++w) sum += values[w];
        a.chosen[blockIdx.x] = Chosen{at, -logf(sum)};
    }
}
