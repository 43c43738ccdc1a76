// What every kernel source starts with. No header of the CUDA toolkit is needed.
//
// BF16=1: weights and the KV cache are bf16 and matrix products use tensor cores.
// BF16=0: everything is f32, and no function is approximate.
//
// Activations are row-major f32 in either case. Products of tokens and widths are 64 bit.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // the upper half of an f32

#if BF16
typedef bf16 weight_t;
#else
typedef float weight_t;
#endif

// Consecutive tokens of one sequence: `len` tokens from row `start` on, at `position` of their
// sequence. Its tokens are cut into segments of SEGMENT; `segment` numbers the first of them
// among those of all runs.
struct Run {
    u32 start, len, position, slot, segment, unused[3];
};
#define SEGMENT 64

#define FULL 0xffffffffu
#define INFINITY_F __int_as_float(0x7f800000)

__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ float widen(float v) { return v; }

// To the nearest, ties to even.
__device__ __forceinline__ bf16 to_bf16(float v) {
    bf16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, bf16& to) { to = to_bf16(v); }

// The two bf16 of a word.
__device__ __forceinline__ float low_bf16(u32 w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high_bf16(u32 w) { return __uint_as_float(w & 0xffff0000u); }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// 2^x of the special function unit: 2 ulp, denormals are flushed.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(FULL, v, mask);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, mask));
    return v;
}

// In one order whatever the compiler makes of sums: norms are to the bit the same in all kernels.
__device__ __forceinline__ float squares(const float4& v) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Copies 4, 8 or 16 bytes to shared memory in the background; zeros where `valid` is false.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 4 : 0));
}
__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 8 : 0));
}
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Four 8 x 8 matrices of bf16 from shared memory in the fragment layout of mma.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const bf16* row) {
    load_matrices(r, shared_address(row));
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// c (16 x 8) += a (16 x 16) b (16 x 8), bf16 with f32 sums.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A kernel that is launched as overlapping begins while the one before it still runs, so that what
// it takes to begin is hidden. Every block waits here for all kernels before it, to whose results
// and operands it must do nothing earlier; what no kernel of a step writes, weights above all, it
// may fetch before. (Not __ldg for what kernels write: a compiler may move that before the wait.)
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel after this one may begin once all blocks have come here or ended. It waits in turn.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Brings so many bytes to the L2 cache; both are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

// Brings what is at an address to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// The last of `count` entries whose first segment is not after `segment`.
__device__ __forceinline__ u32 run_of_segment(const Run* runs, u32 count, u32 segment) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (runs[middle].segment <= segment) low = middle;
        else high = middle;
    }
    return low;
}

// Elements of a weight in 16 bytes.
#define WEIGHT_VECTOR (16 / (int)sizeof(weight_t))

// 16 bytes of a weight as f32.
__device__ __forceinline__ void widen_16(const uint4& w, float* to) {
#if BF16
    to[0] = low_bf16(w.x), to[1] = high_bf16(w.x);
    to[2] = low_bf16(w.y), to[3] = high_bf16(w.y);
    to[4] = low_bf16(w.z), to[5] = high_bf16(w.z);
    to[6] = low_bf16(w.w), to[7] = high_bf16(w.w);
#else
    to[0] = __uint_as_float(w.x), to[1] = __uint_as_float(w.y);
    to[2] = __uint_as_float(w.z), to[3] = __uint_as_float(w.w);
#endif
}

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// ---- quantised weights, of kernels whose operands are bf16 ------------------------------------

__device__ __forceinline__ u32 fma_bf16(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Two of the bytes of a word as bf16, exactly: its lower ones, or its upper ones.
__device__ __forceinline__ u32 widen_int8(u32 word, bool upper) {
    // 128 + the low seven bits, less 128 or, where the sign is set, 256.
    const u32 q = __byte_perm(word, 0x43434343u, upper ? 0x4342 : 0x4140);
    return fma_bf16(q & 0xff80ff80u, 0xbf80bf80u, q & 0xff7fff7fu);
}
// The same of bytes of 0 to 15, less 8.
__device__ __forceinline__ u32 widen_int4(u32 word, bool upper) {
    // 0x43nn is 128 + nn.
    const u32 q = __byte_perm(word, 0x43434343u, upper ? 0x4342 : 0x4140);
    return fma_bf16(q, 0x3f803f80u, 0xc308c308u);
}
// q times scale, rounded to bf16.
__device__ __forceinline__ u32 scale_bf16(u32 q, u32 scale) {
    return fma_bf16(q, scale, 0x80008000u);
}
