// out[t] = table[token[t]], as f32.
//
// Layout: table (vocab, ld) of weight_t, the first `cols` of each row in use, for embed_int8 of int8
// with a bf16 scale for each 32; tokens are (id, run) pairs; out (tokens, cols) f32.
// Threads: a block per token, which walks over the columns.
// Constraints: every id is a row of the table; the launcher has seen to it.

struct EmbedArgs {
    const void* table;
    const bf16* scales;
    const uint2* tokens;
    float* out;
    u32 cols, ld;
    u32 scale_stride;  // bytes
};

extern "C" __global__ void __launch_bounds__(256) embed(const EmbedArgs a) {
    let_next_begin();
    await_inputs();
    const u64 t = blockIdx.x;
    const weight_t* row = (const weight_t*)a.table + (u64)a.tokens[t].x * a.ld;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) a.out[t * a.cols + c] = widen(row[c]);
}

extern "C" __global__ void __launch_bounds__(256) embed_int8(const EmbedArgs a) {
    let_next_begin();
    await_inputs();
    const u64 t = blockIdx.x, id = a.tokens[t].x;
    const signed char* row = (const signed char*)a.table + id * a.ld;
    const bf16* scales = a.scales + id * (a.scale_stride / 2);
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) {
        a.out[t * a.cols + c] = (float)row[c] * widen(scales[c / 32]);
    }
}
