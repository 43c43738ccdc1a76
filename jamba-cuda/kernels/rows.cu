// out[i] = x[index[i]]: the rows whose logits are asked for.
//
// Layout: x (tokens, cols) and out (outputs, cols) f32, index (outputs).
// Threads: a block per output row, which walks over the columns.

struct RowsArgs {
    const float* x;
    const u32* index;
    float* out;
    u32 cols;
};

extern "C" __global__ void __launch_bounds__(256) output_rows(const RowsArgs a) {
    let_next_begin();
    await_inputs();
    const u64 from = (u64)a.index[blockIdx.x] * a.cols, to = (u64)blockIdx.x * a.cols;
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) a.out[to + c] = a.x[from + c];
}
