// add: out = x + y, over `n` elements; out may be x.
// silu_mul: out[r, c] = silu(gate_up[r, c]) gate_up[r, cols + c].
// silu_mul_bf16: the same rounded to bf16, for the matrix product that follows.
//
// Layout: x, y and out of add any contiguous f32; gate_up (rows, 2 cols), out (rows, cols) f32; out of
// silu_mul_bf16 (rows, cols padded to a multiple of 8), the padding zero.
// Threads: add an element, or four where n is a multiple of four, per thread, in a stride
// of the grid; silu_mul a block per row and 1024 columns.

struct AddArgs {
    const float* x;
    const float* y;
    float* out;
    u64 n;
};

extern "C" __global__ void __launch_bounds__(256) add(const AddArgs a) {
    let_next_begin();
    await_inputs();
    const u64 step = (u64)gridDim.x * blockDim.x;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (a.n % 4 == 0) {
        const float4* x = (const float4*)a.x;
        const float4* y = (const float4*)a.y;
        for (; i < a.n / 4; i += step) {
            float4 v = x[i], w = y[i];
            v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
            ((float4*)a.out)[i] = v;
        }
    } else {
        for (; i < a.n; i += step) a.out[i] = a.x[i] + a.y[i];
    }
}

struct SiluMulArgs {
    const float* gate_up;
    float* out;
    u32 cols;
};

extern "C" __global__ void __launch_bounds__(256) silu_mul(const SiluMulArgs a) {
    let_next_begin();
    await_inputs();
    const u64 row = blockIdx.x;
    const float* gate = a.gate_up + row * 2 * a.cols;
    const float* up = gate + a.cols;
    float* out = a.out + row * a.cols;
    const u32 c = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (a.cols % 4 == 0) {
        if (c >= a.cols) return;
        const float4 g = *(const float4*)(gate + c), u = *(const float4*)(up + c);
        *(float4*)(out + c) = make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z,
                                          silu(g.w) * u.w);
    } else {
        for (u32 i = c; i < min(c + 4, a.cols); ++i) out[i] = silu(gate[i]) * up[i];
    }
}

struct SiluMulBf16Args {
    const float* gate_up;
    bf16* out;
    u32 cols, ldo;
};

extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(const SiluMulBf16Args a) {
    let_next_begin();
    await_inputs();
    const u64 row = blockIdx.x;
    const float* gate = a.gate_up + row * 2 * a.cols;
    const float* up = gate + a.cols;
    const u32 c = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (c >= a.ldo) return;
    float v[4];
    if (a.cols % 4 == 0 && c < a.cols) {
        const float4 g = *(const float4*)(gate + c), u = *(const float4*)(up + c);
        v[0] = silu(g.x) * u.x, v[1] = silu(g.y) * u.y;
        v[2] = silu(g.z) * u.z, v[3] = silu(g.w) * u.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) v[i] = c + i < a.cols ? silu(gate[c + i]) * up[c + i] : 0.0f;
    }
    *(uint2*)(a.out + row * a.ldo + c) =
        make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}
