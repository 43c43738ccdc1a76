// Quantising while a model is loaded, to the byte as jamba_core::quant defines it, and back.
//
// quantize_rows     int8 with an f32 scale per row
// quantize_int8     int8 in blocks of 32 with a bf16 scale each
// quantize_int4     four bits in blocks of 32 with a bf16 scale each
// dequantize_*      q scale, rounded to weight_t, rows padded with zeros to ldo
//
// Layout: from (rows, cols) of f32, f16 or bf16, contiguous; quants rows of `stride` bytes, scales
// rows of `scale_stride` bytes.
// Threads: quantize_rows a block per row; quantize_int8 and _int4 a warp per block of weights, 8
// of them along y; dequantize_* a thread per 8 weights of a row.
// Every operation is the IEEE one that the host does, in its order: nothing is contracted.

struct QuantizeArgs {
    const void* from;
    unsigned char* quants;
    unsigned char* scales;
    u64* bad;   // lowest number of an element that cannot be quantised
    u64 first;  // number of the first element of `from`
    u32 cols, stride, scale_stride;
    u32 dtype;  // 0 f32, 1 f16, 2 bf16
};

#define LIMIT 0x7e800000u  // 2^126
#define SMALLEST 1.17549435e-38f  // normal number

__device__ __forceinline__ float read(const QuantizeArgs& a, u32 column) {
    const u64 at = (u64)blockIdx.x * a.cols + column;
    float v;
    if (a.dtype == 0) {
        v = ((const float*)a.from)[at];
    } else if (a.dtype == 1) {
        asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(((const unsigned short*)a.from)[at]));
    } else {
        v = widen(((const bf16*)a.from)[at]);
    }
    if ((__float_as_uint(v) & 0x7fffffffu) >= LIMIT) atomicMin(a.bad, a.first + at);
    return v;
}

__device__ __forceinline__ float nearest(float v) {
    return __fsub_rn(__fadd_rn(v, 12582912.0f), 12582912.0f);
}

// a / m, rounded up to a number whose low `bits` bits are zero.
__device__ __forceinline__ float divide_up(float a, float m, u32 bits) {
    const u32 low = (1u << bits) - 1;
    const u32 up = (__float_as_uint(__fdiv_rn(a, m)) + low) & ~low;
    const float scale = __uint_as_float(up);
    return __fmul_rn(scale, m) < a ? __uint_as_float(up + low + 1) : scale;
}

extern "C" __global__ void __launch_bounds__(256) quantize_rows(const QuantizeArgs a) {
    __shared__ float maxima[8];
    float largest = 0.0f;
    for (u32 c = threadIdx.x; c < a.cols; c += 256) largest = fmaxf(largest, fabsf(read(a, c)));
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
    __syncthreads();
    for (u32 i = 0; i < 8; ++i) largest = fmaxf(largest, maxima[i]);
    const float up = divide_up(largest, 127.0f, 8);
    const float scale = up < SMALLEST ? 0.0f : up;
    signed char* to = (signed char*)a.quants + (u64)blockIdx.x * a.stride;
    for (u32 c = threadIdx.x; c < a.stride; c += 256) {
        const bool within = c < a.cols && scale > 0.0f;
        to[c] = within ? (signed char)(int)nearest(__fdiv_rn(read(a, c), scale)) : 0;
    }
    if (threadIdx.x == 0) *(float*)(a.scales + (u64)blockIdx.x * a.scale_stride) = scale;
}

// The quant of this lane's weight under the best of the scales, which is written to `best`, 0 if
// none can be used.
template <int CHOICES, class Usable>
__device__ __forceinline__ float choose(float w, const float (&scales)[CHOICES], Usable usable,
                                        float& best) {
    float first = 0.0f, least = 0.0f, q = 0.0f;
    best = 0.0f;
#pragma unroll
    for (int i = 0; i < CHOICES; ++i) {
        const float scale = scales[i];
        if (fabsf(scale) < SMALLEST) continue;
        const float quotient = __fdiv_rn(w, scale), rounded = nearest(quotient);
        if (!usable(rounded)) continue;
        const float off = __fsub_rn(quotient, rounded);
        float squares = __fmul_rn(off, off);
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) {
            squares = __fadd_rn(squares, __shfl_xor_sync(FULL, squares, mask));
        }
        if (first == 0.0f) first = scale;
        const float relative = __fdiv_rn(scale, first);
        const float error = __fmul_rn(squares, __fmul_rn(relative, relative));
        if (best == 0.0f || error < least) least = error, best = scale, q = rounded;
    }
    return q;
}

template <bool INT4>
__device__ __forceinline__ void quantize_blocks(const QuantizeArgs& a) {
    const u32 lane = threadIdx.x % 32, block = blockIdx.y * 8 + threadIdx.x / 32;
    if (block * 32 >= a.cols) return;
    const u32 c = block * 32 + lane;
    const float w = c < a.cols ? read(a, c) : 0.0f;
    unsigned char* to = a.quants + (u64)blockIdx.x * a.stride;
    float scale;
    if (INT4) {
        const float high = warp_max(fmaxf(w, 0.0f)), low = -warp_max(fmaxf(-w, 0.0f));
        const bool positive = high > -low;
        const float largest = positive ? high : -low, sign = positive ? -1.0f : 1.0f;
        const float scales[4] = {
            sign * divide_up(largest, 8.375f, 16), sign * divide_up(largest, 8.0f, 16),
            sign * divide_up(largest, 7.5f, 16), sign * divide_up(largest, 7.0f, 16)};
        auto usable = [](float q) {
            const float most = warp_max(q), least = -warp_max(-q);
            return least >= -8.0f && least <= -7.0f && most <= 7.0f;
        };
        const u32 nibble = (u32)(choose(w, scales, usable, scale) + 8.0f);
        const u32 upper = __shfl_down_sync(FULL, nibble, 16);
        if (lane < 16) to[block * 16 + lane] = nibble | upper << 4;
    } else {
        const float largest = warp_max(fabsf(w));
        const float scales[2] = {divide_up(largest, 127.0f, 16), divide_up(largest, 126.0f, 16)};
        auto usable = [](float q) { return warp_max(fabsf(q)) >= 126.0f; };
        to[c] = (unsigned char)(signed char)(int)choose(w, scales, usable, scale);
    }
    if (lane == 0) {
        ((bf16*)(a.scales + (u64)blockIdx.x * a.scale_stride))[block] =
            __float_as_uint(scale) >> 16;
    }
}

extern "C" __global__ void __launch_bounds__(256) quantize_int8(const QuantizeArgs a) {
    quantize_blocks<false>(a);
}
extern "C" __global__ void __launch_bounds__(256) quantize_int4(const QuantizeArgs a) {
    quantize_blocks<true>(a);
}

struct DequantizeArgs {
    const unsigned char* quants;
    const unsigned char* scales;
    weight_t* out;
    u32 cols, stride, scale_stride, ldo;
};

__device__ __forceinline__ float int8_at(u32 word, int byte) {
    return (float)(signed char)(word >> 8 * byte);
}

// PACKING as in few.cu.
template <int PACKING>
__device__ __forceinline__ void dequantize(const DequantizeArgs& a) {
    const u32 c = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (c >= a.ldo) return;
    const unsigned char* quants = a.quants + (u64)blockIdx.x * a.stride;
    const unsigned char* scales = a.scales + (u64)blockIdx.x * a.scale_stride;
    const float scale = c >= a.cols ? 0.0f : PACKING == 1 ? *(const float*)scales
                                           : widen(((const bf16*)scales)[c / 32]);
    float v[8];
    if (PACKING == 3) {
        // Eight bytes of a block, of which the upper or the lower halves are these weights.
        const uint2 q = c < a.cols ? *(const uint2*)(quants + c / 32 * 16 + c % 16)
                                   : make_uint2(0, 0);
        const u32 shift = c % 32 / 16 * 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 word = i < 4 ? q.x : q.y;
            v[i] = ((float)(word >> (8 * (i % 4) + shift) & 15) - 8.0f) * scale;
        }
    } else {
        const uint2 q = c < a.cols ? *(const uint2*)(quants + c) : make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = int8_at(i < 4 ? q.x : q.y, i % 4) * scale;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = c + i < a.cols ? v[i] : 0.0f;
    weight_t* out = a.out + (u64)blockIdx.x * a.ldo + c;
#if BF16
    *(uint4*)out = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                              pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
#else
    *(float4*)out = make_float4(v[0], v[1], v[2], v[3]);
    if (c + 4 < a.ldo) *(float4*)(out + 4) = make_float4(v[4], v[5], v[6], v[7]);
#endif
}

extern "C" __global__ void __launch_bounds__(256) dequantize_rows(const DequantizeArgs a) {
    dequantize<1>(a);
}
extern "C" __global__ void __launch_bounds__(256) dequantize_int8(const DequantizeArgs a) {
    dequantize<2>(a);
}
extern "C" __global__ void __launch_bounds__(256) dequantize_int4(const DequantizeArgs a) {
    dequantize<3>(a);
}
