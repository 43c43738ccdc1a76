// Random weights, of which any can be drawn by itself: value i of a matrix is made of the counter
// state + (i + 1) * STEP by SplitMix64 (jamba_core::random::Draw), bit for bit as on the host.
//
// Layout: out (rows, cols) with ld elements from one row to the next.
// Threads: a block per row, which walks over the columns.

struct DrawArgs {
    void* out;
    u64 state;
    float scale;
    u32 cols, ld;
    u32 is_bf16;  // whether the values are rounded to bf16, also where they are kept in f32
};

__device__ __forceinline__ float value(u64 z, float scale) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    const u32 bytes = (u32)((z ^ (z >> 31)) >> 32);
    const u32 sum = (bytes & 255) + (bytes >> 8 & 255) + (bytes >> 16 & 255) + (bytes >> 24);
    return __fmul_rn(scale, __fdiv_rn(__fsub_rn((float)sum, 510.0f), 147.8f));
}

template <typename T>
__device__ __forceinline__ void draw(const DrawArgs& a) {
    const u64 first = (u64)blockIdx.x * a.cols;
    T* row = (T*)a.out + (u64)blockIdx.x * a.ld;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) {
        float v = value(a.state + (first + c + 1) * 0x9e3779b97f4a7c15ull, a.scale);
        if (a.is_bf16) v = widen(to_bf16(v));
        narrow(v, row[c]);
    }
}

extern "C" __global__ void __launch_bounds__(256) draw_bf16(const DrawArgs a) { draw<bf16>(a); }
extern "C" __global__ void __launch_bounds__(256) draw_f32(const DrawArgs a) { draw<float>(a); }
