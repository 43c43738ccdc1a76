// read: reads n words of 16 bytes, and nothing else: what a step at the limit of memory does.
//
// Layout: x aligned to 16 bytes; out one word, which is written only for a sum that chance does not
// give, so that nothing is read in vain.
// Threads: a word per thread and turn, four turns in flight, in strides of the grid.

struct ReadArgs {
    const uint4* x;
    u32* out;
    u64 n;
};

extern "C" __global__ void __launch_bounds__(512) read(const ReadArgs a) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    u32 sum = 0;
#pragma unroll 4
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += step) {
        const uint4 v = load_streaming(a.x + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x9e3779b9u) *a.out = sum;
}
