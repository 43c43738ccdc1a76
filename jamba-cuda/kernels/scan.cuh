// What the kernels of the selective scan have in common, after common.cuh.
//
// decay is exp(dt A). In bf16 mode exponentials, logarithms and quotients are those of the
// special function unit, within a few ulp and without a branch: a block has too few warps to hide
// the latency of one. In f32 mode they are as exact as those of the other operators.
#if BF16
#define LOG2_E 1.4426950408889634f
#define A_UNIT LOG2_E
__device__ __forceinline__ float decay(float v) { return exp2_approx(v); }
__device__ __forceinline__ float gate(float z) {
    return __fdividef(z, 1.0f + exp2_approx(-LOG2_E * z));
}
__device__ __forceinline__ float step_size(float v) {
    const float e = exp2_approx(LOG2_E * v);
    float log;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(1.0f + e));
    // The logarithm has an absolute error near 1: there the series of log(1 + e), to e^5.
    const float series = e * (1.0f - e * (0.5f - e * (0.33333333f - e * (0.25f - e * 0.2f))));
    const float soft = e < 0.03f ? series : log * 0.69314718f;
    return v > 20.0f ? v : soft;
}
#else
#define A_UNIT 1.0f
__device__ __forceinline__ float decay(float v) { return expf(v); }
__device__ __forceinline__ float gate(float z) { return silu(z); }
__device__ __forceinline__ float step_size(float v) { return softplus(v); }
#endif
