//! Grouped-query attention over the KV cache, softmax in one pass over blocks of keys.

use jamba_core::Batch;

use crate::linear::tile;
use crate::simd::columns::{Columns, for_each};
use crate::simd::{Isa, Simd, exp, with_simd};
use crate::state::Cache;
use crate::tensor::View;

/// Keys whose scores are held at once.
const BLOCK: usize = 64;
/// Multiply-adds below which threads are not worth waking.
const PARALLEL: usize = 1 << 18;

/// `out (tokens, heads * head_dim)` for `qkv (tokens, (heads + 2 kv_heads) head_dim)`. The keys
/// and values of the batch are appended to the cache first.
pub(crate) fn attention(
    isa: Isa,
    qkv: View<'_>,
    batch: &Batch,
    cache: &mut Cache,
    out: &mut [f32],
) {
    cache.append(qkv, batch);
    let cache = &*cache;
    let [heads, kv_heads, head_dim] = cache.heads;
    let width = heads * head_dim;
    let keys: usize = batch.runs().iter().map(|r| r.len * (r.position + r.len)).sum();
    let parallel = keys * width >= PARALLEL;
    for_each([Columns::new(out, width, width, head_dim)], parallel, |[mut block]| {
        let cols = block.cols();
        let kv_head = cols.start / head_dim / (heads / kv_heads);
        let mut first = 0;
        for run in batch.runs() {
            let (keys, values) = cache.head(run.slot, kv_head);
            for t in 0..run.len {
                let seen = (run.position + t + 1) * head_dim;
                let query = &qkv.row(first + t)[cols.clone()];
                let out = block.row(first + t);
                with_simd!(isa, s => attend(s, query, &keys[..seen], &values[..seen], out));
            }
            first += run.len;
        }
    });
}

/// `out = softmax(q K^T / sqrt(head_dim)) V` for one query: K and V `(positions, head_dim)`.
#[inline(always)]
fn attend<S: Simd>(s: S, query: &[f32], keys: &[f32], values: &[f32], out: &mut [f32]) {
    let head_dim = query.len();
    let scale = (head_dim as f32).sqrt().recip();
    let mut largest = f32::NEG_INFINITY;
    let mut total = 0.0;
    out.fill(0.0);
    for (keys, values) in keys.chunks(BLOCK * head_dim).zip(values.chunks(BLOCK * head_dim)) {
        let n = keys.len() / head_dim;
        let key = |i: usize| &keys[i * head_dim..(i + 1) * head_dim];
        let mut scores = [f32::NEG_INFINITY; BLOCK];
        let mut i = 0;
        while i + 4 <= n {
            let [four] = tile(s, [query], std::array::from_fn::<_, 4, _>(|j| key(i + j)));
            scores[i..i + 4].copy_from_slice(&four.map(|v| v * scale));
            i += 4;
        }
        while i < n {
            let [[one]] = tile(s, [query], [key(i)]);
            scores[i] = one * scale;
            i += 1;
        }
        let mut block_largest = s.splat(largest);
        for chunk in scores.chunks_exact(S::LANES) {
            // The second operand comes through if it is NaN.
            block_largest = s.max(block_largest, s.load(chunk));
        }
        let block_largest = s.max_lane(block_largest);
        // Brings what was summed so far to the new largest score; nothing before the first block.
        let shrink =
            if largest == f32::NEG_INFINITY { 0.0 } else { (largest - block_largest).exp() };
        largest = block_largest;
        let mut sum = s.splat(0.0);
        for chunk in scores.chunks_exact_mut(S::LANES) {
            let p = exp(s, s.sub(s.load(chunk), s.splat(largest)));
            sum = s.add(sum, p);
            s.store(p, chunk);
        }
        total = total * shrink + s.sum(sum);
        accumulate(s, out, shrink, &scores[..n], values);
    }
    let scale = total.recip();
    out.iter_mut().for_each(|v| *v *= scale);
}

/// `out = shrink * out + sum_i p[i] values[i]`.
#[inline(always)]
fn accumulate<S: Simd>(s: S, out: &mut [f32], shrink: f32, p: &[f32], values: &[f32]) {
    let head_dim = out.len();
    for c in (0..head_dim).step_by(S::LANES) {
        let width = S::LANES.min(head_dim - c);
        let load = |v: &[f32]| {
            if width == S::LANES { s.load(v) } else { s.load_partial(&v[..width]) }
        };
        let mut sum = s.mul(load(&out[c..]), s.splat(shrink));
        for (i, p) in p.iter().enumerate() {
            sum = s.fma(load(&values[i * head_dim + c..]), s.splat(*p), sum);
        }
        s.store_partial(sum, &mut out[c..c + width]);
    }
}
