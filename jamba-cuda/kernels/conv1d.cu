// y[t, i] = silu(bias[i] + sum_j w[i, j] x[t - D_CONV + 1 + j, i]), causal and depthwise, each
// run continuing from its state, which then holds the latest D_CONV - 1 inputs.
//
// causal_conv1d       runs of any length
// causal_conv1d_step  one token in each run
//
// Layout: x (tokens, ldx) f32 of which d_inner columns are used; weight (d_inner, D_CONV),
// oldest tap first; state (slots, d_inner, D_CONV - 1), oldest first; y (tokens, d_inner).
// Threads: a thread per channel and segment of a run, or token; blocks of 128 channels. The inputs before
// a segment are read from x, those before a run from the state; only the thread of the first
// segment of a run reads the state, and it writes the new one afterwards.
// Constraints: 1 <= D_CONV <= SEGMENT + 1.

#define PAST (D_CONV - 1)

struct ConvArgs {
    const float* x;
    const float* weight;
    const float* bias;  // or null
    float* state;
    float* y;
    const Run* runs;
    u32 run_count, d_inner, ldx;
};

extern "C" __global__ void __launch_bounds__(128) causal_conv1d(const ConvArgs a) {
    let_next_begin();
    await_inputs();
    const u32 i = blockIdx.y * 128 + threadIdx.x;
    if (i >= a.d_inner) return;
    const Run run = a.runs[run_of_segment(a.runs, a.run_count, blockIdx.x)];
    const u32 first = (blockIdx.x - run.segment) * SEGMENT;
    if (first >= run.len) return;
    const u32 last = min(first + SEGMENT, run.len);
    const float* x = a.x + (u64)run.start * a.ldx + i;
    float* y = a.y + (u64)run.start * a.d_inner + i;
    float* state = a.state + ((u64)run.slot * a.d_inner + i) * PAST;

    float w[D_CONV];
#pragma unroll
    for (int j = 0; j < D_CONV; ++j) w[j] = a.weight[(u64)i * D_CONV + j];
    const float bias = a.bias ? a.bias[i] : 0.0f;

    // The D_CONV latest inputs, oldest first.
    float window[D_CONV];
#pragma unroll
    for (int j = 0; j < PAST; ++j) {
        window[j + 1] = first == 0 ? state[j] : x[(u64)(first - PAST + j) * a.ldx];
    }
    for (u32 t = first; t < last; t += 4) {
        float in[4];
#pragma unroll
        for (u32 k = 0; k < 4; ++k) in[k] = t + k < last ? x[(u64)(t + k) * a.ldx] : 0.0f;
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            if (t + k < last) {
#pragma unroll
                for (int j = 0; j < PAST; ++j) window[j] = window[j + 1];
                window[PAST] = in[k];
                float sum = bias;
#pragma unroll
                for (int j = 0; j < D_CONV; ++j) sum += w[j] * window[j];
                y[(u64)(t + k) * a.d_inner] = silu(sum);
            }
        }
    }
    if (first != 0) return;
    // With one segment the window ends with the run; a longer run has its end in x.
#pragma unroll
    for (int j = 0; j < PAST; ++j) {
        state[j] = run.len <= SEGMENT ? window[j + 1] : x[(u64)(run.len - PAST + j) * a.ldx];
    }
}

extern "C" __global__ void __launch_bounds__(128) causal_conv1d_step(const ConvArgs a) {
    let_next_begin();
    const u32 t = blockIdx.x, i = blockIdx.y * 128 + threadIdx.x;
    const bool active = i < a.d_inner;
    float* state = a.state + ((u64)a.runs[t].slot * a.d_inner + i) * PAST;
    float w[D_CONV], window[D_CONV];
    if (active) {
#pragma unroll
        for (int j = 0; j < D_CONV; ++j) w[j] = a.weight[(u64)i * D_CONV + j];
        if (PAST > 0) prefetch_l2(state);
    }
    float sum = active && a.bias ? a.bias[i] : 0.0f;
    await_inputs();
    if (!active) return;
#pragma unroll
    for (int j = 0; j < PAST; ++j) window[j] = state[j];
    window[PAST] = a.x[(u64)t * a.ldx + i];
#pragma unroll
    for (int j = 0; j < D_CONV; ++j) sum += w[j] * window[j];
    a.y[(u64)t * a.d_inner + i] = silu(sum);
#pragma unroll
    for (int j = 0; j < PAST; ++j) state[j] = window[j + 1];
}

#if BF16 && D_CONV <= 8
// The same with x and y in bf16, for prompts: 4 channels per thread, 512 per block; d_inner and ldx
// multiples of 8.
struct ConvBf16Args {
    const bf16* x;
    const float* weight;
    const float* bias;  // or null
    float* state;
    bf16* y;
    const Run* runs;
    u32 run_count, d_inner, ldx;
};

__device__ __forceinline__ void load_channels(const bf16* x, float (&to)[4]) {
    const uint2 v = *(const uint2*)x;
    to[0] = low_bf16(v.x), to[1] = high_bf16(v.x), to[2] = low_bf16(v.y), to[3] = high_bf16(v.y);
}
__device__ __forceinline__ float silu_fast(float v) {
    return __fdividef(v, 1.0f + exp2_approx(-1.4426950408889634f * v));
}

extern "C" __global__ void __launch_bounds__(128) causal_conv1d_bf16(const ConvBf16Args a) {
    const u32 i = (blockIdx.y * 128 + threadIdx.x) * 4;
    if (i >= a.d_inner) return;
    const Run run = a.runs[run_of_segment(a.runs, a.run_count, blockIdx.x)];
    const u32 first = (blockIdx.x - run.segment) * SEGMENT;
    if (first >= run.len) return;
    const u32 last = min(first + SEGMENT, run.len);
    const bf16* x = a.x + (u64)run.start * a.ldx + i;
    bf16* y = a.y + (u64)run.start * a.d_inner + i;
    float* state = a.state + ((u64)run.slot * a.d_inner + i) * PAST;

    float w[D_CONV][4], bias[4], window[D_CONV][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int j = 0; j < D_CONV; ++j) w[j][c] = a.weight[(u64)(i + c) * D_CONV + j];
        bias[c] = a.bias ? a.bias[i + c] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < PAST; ++j) {
        if (first > 0) {
            load_channels(x + (u64)(first - PAST + j) * a.ldx, window[j + 1]);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) window[j + 1][c] = state[c * PAST + j];
        }
    }
    for (u32 t = first; t < last; t += 4) {
        float in[4][4];
#pragma unroll
        for (u32 k = 0; k < 4; ++k) load_channels(x + (u64)min(t + k, last - 1) * a.ldx, in[k]);
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            if (t + k >= last) break;
            float sum[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int j = 0; j < PAST; ++j) window[j][c] = window[j + 1][c];
                window[PAST][c] = in[k][c];
                sum[c] = bias[c];
#pragma unroll
                for (int j = 0; j < D_CONV; ++j) sum[c] += w[j][c] * window[j][c];
                sum[c] = silu_fast(sum[c]);
            }
            *(uint2*)(y + (u64)(t + k) * a.d_inner) =
                make_uint2(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]));
        }
    }
    if (first != 0) return;
    // With one segment the window ends with the run; a longer run has its end in x.
#pragma unroll
    for (int j = 0; j < PAST; ++j) {
        float end[4];
        if (run.len > SEGMENT) load_channels(x + (u64)(run.len - PAST + j) * a.ldx, end);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            state[c * PAST + j] = run.len > SEGMENT ? end[c] : window[j + 1][c];
        }
    }
}
#endif
