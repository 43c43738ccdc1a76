// out[t] = table[token[t]], as f32.
//
// Layout: table (vocab, ld) of weight_t, the first `cols` of each row in use; tokens are
// (id, run) pairs; out (tokens, cols) f32.
// Threads: a block per token, which walks over the columns.
// Constraints: every id is a row of the table; the launcher has seen to it.

struct EmbedArgs {
    const weight_t* table;
    const uint2* tokens;
    float* out;
    u32 cols, ld;
};

extern "C" __global__ void __launch_bounds__(256) embed(const EmbedArgs a) {
    let_next_begin();
    await_inputs();
    const u64 t = blockIdx.x;
    const weight_t* row = a.table + (u64)a.tokens[t].x * a.ld;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) a.out[t * a.cols + c] = widen(row[c]);
}
