//! Grouped-query attention over the KV cache.

use jamba_core::Batch;
use ndarray::{Array2, ArrayView2, s};

use super::linear::dot;
use super::state::Cache;

/// Per query head h, which reads key and value head `h / (heads / kv_heads)`, at position p:
///
/// ```text
/// out = sum_{s <= p} softmax_s(q . k_s / sqrt(head_dim)) v_s
/// ```
///
/// `qkv` is `(tokens, (heads + 2 kv_heads) head_dim)`, columns `[q | k | v]`; no positional
/// encoding. The keys and values of the batch are appended to the cache first.
pub(super) fn attention(qkv: ArrayView2<'_, f32>, batch: &Batch, cache: &mut Cache) -> Array2<f32> {
    let [heads, kv_heads, head_dim] = cache.heads;
    let head = |t: usize, h: usize| qkv.slice(s![t, h * head_dim..(h + 1) * head_dim]);
    let mut out = Array2::zeros((qkv.nrows(), heads * head_dim));
    let mut t = 0;
    for run in batch.runs() {
        for position in run.position..run.position + run.len {
            for g in 0..kv_heads {
                let at = s![run.slot, g, position, ..];
                cache.keys.slice_mut(at).assign(&head(t, heads + g));
                cache.values.slice_mut(at).assign(&head(t, heads + kv_heads + g));
            }
            for h in 0..heads {
                let seen = s![run.slot, h / (heads / kv_heads), ..=position, ..];
                let (keys, values) = (cache.keys.slice(seen), cache.values.slice(seen));

                let scale = (head_dim as f64).sqrt();
                let scores: Vec<f64> =
                    keys.rows().into_iter().map(|key| dot(head(t, h), key) / scale).collect();
                for (i, p) in softmax(&scores).into_iter().enumerate() {
                    for j in 0..head_dim {
                        out[[t, h * head_dim + j]] += p * f64::from(values[[i, j]]);
                    }
                }
            }
            t += 1;
        }
    }
    out.mapv(|v: f64| v as f32)
}

/// `exp(x_i) / sum_j exp(x_j)`.
pub(super) fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}
