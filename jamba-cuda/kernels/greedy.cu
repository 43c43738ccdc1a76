// chosen[r] = { the column of the largest x[r], of equal ones the lowest;
//               x[r][column] - log(sum over c of exp(x[r][c])) }
// A row with a value that is not finite gives the column FULL.
//
// greedy_parts  the same of every part of COLS columns
// greedy        of the row, from those of its parts
//
// Layout: x (rows, cols) f32, part (rows, parts), chosen (rows).
// Threads: a block per part; then a warp per row.

struct Chosen {
    u32 id;
    float logprob;
};

// The largest value and its column, and the sum of exp(x - value).
struct Part {
    float value;
    u32 at;
    float sum;
    u32 unusable;
};

struct GreedyArgs {
    const float* x;
    Part* part;
    Chosen* chosen;
    u32 rows, cols, parts;
};

#define COLS 2048
#define THREADS 256
#define WARPS (THREADS / 32)

__device__ __forceinline__ void keep_better(float& value, u32& at, float other, u32 other_at) {
    if (other > value || (other == value && other_at < at)) value = other, at = other_at;
}

// The best of a warp, in all of its threads.
__device__ __forceinline__ void warp_best(float& value, u32& at) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        keep_better(value, at, __shfl_xor_sync(FULL, value, mask), __shfl_xor_sync(FULL, at, mask));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) greedy_parts(const GreedyArgs a) {
    __shared__ float values[WARPS], sums[WARPS];
    __shared__ u32 places[WARPS];
    let_next_begin();
    await_inputs();
    const float* row = a.x + (u64)blockIdx.x * a.cols;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * COLS;
    float x[COLS / THREADS], value = -INFINITY_F;
    u32 at = FULL;
    int unusable = 0;
#pragma unroll
    for (u32 k = 0; k < COLS / THREADS; ++k) {
        const u32 c = first + k * THREADS + threadIdx.x;
        x[k] = c < a.cols ? row[c] : -INFINITY_F;
    }
#pragma unroll
    for (u32 k = 0; k < COLS / THREADS; ++k) {
        const u32 c = first + k * THREADS + threadIdx.x;
        if (c >= a.cols) continue;
        unusable |= !(fabsf(x[k]) < INFINITY_F);
        keep_better(value, at, x[k], c);
    }
    warp_best(value, at);
    if (lane == 0) values[warp] = value, places[warp] = at;
    unusable = __syncthreads_or(unusable);
#pragma unroll
    for (u32 w = 0; w < WARPS; ++w) keep_better(value, at, values[w], places[w]);
    float sum = 0.0f;
#pragma unroll
    for (u32 k = 0; k < COLS / THREADS; ++k) sum += expf(x[k] - value);
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = 0.0f;
    for (u32 w = 0; w < WARPS; ++w) sum += sums[w];
    a.part[(u64)blockIdx.x * a.parts + blockIdx.y] = Part{value, at, sum, (u32)unusable};
}

extern "C" __global__ void __launch_bounds__(128) greedy(const GreedyArgs a) {
    let_next_begin();
    await_inputs();
    const u32 row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    const Part* parts = a.part + (u64)row * a.parts;
    float value = -INFINITY_F, sum = 0.0f;
    u32 at = FULL;
    int unusable = 0;
    for (u32 p = lane; p < a.parts; p += 32) {
        unusable |= parts[p].unusable != 0;
        keep_better(value, at, parts[p].value, parts[p].at);
    }
    warp_best(value, at);
    unusable = __any_sync(FULL, unusable);
    for (u32 p = lane; p < a.parts; p += 32) sum += parts[p].sum * expf(parts[p].value - value);
    sum = warp_sum(sum);
    if (lane == 0) a.chosen[row] = unusable ? Chosen{FULL, 0.0f} : Chosen{at, -logf(sum)};
}
