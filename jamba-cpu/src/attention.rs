//! Grouped-query attention over the KV cache, softmax in one pass over blocks of keys.
//!
//! A task has some tokens and some of the heads that share a key head: it reads each block of keys
//! and values once for all of them. Blocks begin at multiples of [`BLOCK`] positions, and a query
//! goes through them in order, so that its result depends neither on the other queries nor on how
//! the prompt was cut.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use jamba_core::{Batch, Run};

use crate::columns::{Block, Columns, for_each_group, parallel};
use crate::simd::dots::{TILE_N, Turn, Widened, tile};
use crate::simd::{Isa, Simd, exp, with_simd};
use crate::state::Cache;
use crate::tensor::View;

/// Keys whose scores are held at once.
const BLOCK: usize = 64;
/// Queries of a task at most: tokens and heads.
const QUERIES: usize = 64;
/// Heads of a task at most.
const HEADS: usize = 8;
/// Queries that share the loads of keys and values.
const TILE_M: usize = 4;

/// `out (tokens, heads * head_dim)` for `qkv (tokens, (heads + 2 kv_heads) head_dim)`. The keys
/// and values of the batch are appended to the cache first.
pub(crate) fn attention(
    isa: Isa,
    qkv: View<'_>,
    batch: &Batch,
    cache: &mut Cache,
    out: &mut [f32],
) {
    thread_local! {
        // Taken out while it is used: another session may run on this thread meanwhile.
        static ENDS: Cell<Vec<usize>> = const { Cell::new(Vec::new()) };
    }
    cache.append(qkv, batch);
    let cache = &*cache;
    let [heads, kv_heads, head_dim] = cache.heads;
    let group = heads / kv_heads;
    let shared = (1..=HEADS.min(group)).rev().find(|n| group.is_multiple_of(*n)).unwrap_or(1);
    let tokens = QUERIES / shared;

    let mut ends = ENDS.take();
    ends.clear();
    let mut first = 0;
    for run in batch.runs() {
        ends.extend(
            (first..first + run.len).step_by(tokens).map(|t| (t + tokens).min(first + run.len)),
        );
        first += run.len;
    }
    let keys: usize = batch.runs().iter().map(|r| r.len * (r.position + r.len)).sum();
    let parallel = keys * heads * head_dim >= parallel::PRODUCTS;
    let matrix = Columns::new(out, heads * head_dim, heads * head_dim, shared * head_dim);
    for_each_group(&matrix, &ends, parallel, |index, mut out| {
        let tokens = if index == 0 { 0..ends[0] } else { ends[index - 1]..ends[index] };
        let (run, first) = run_of(batch, tokens.start);
        let (keys, values) = cache.head(run.slot, out.cols().start / head_dim / group);
        let task = Task {
            position: run.position + tokens.start - first,
            qkv,
            tokens,
            heads: shared,
            head_dim,
            keys,
            values,
        };
        with_simd!(isa, s => task.attend(s, &mut out));
    });
    ENDS.set(ends);
}

/// The run that a token is in, and its first token.
#[expect(clippy::unreachable, reason = "every token of a batch is in one of its runs")]
fn run_of(batch: &Batch, token: usize) -> (Run, usize) {
    let mut first = 0;
    for run in batch.runs() {
        if token < first + run.len {
            return (*run, first);
        }
        first += run.len;
    }
    unreachable!("token {token} of {first}")
}

struct Task<'a> {
    qkv: View<'a>,
    /// Rows of `qkv`.
    tokens: Range<usize>,
    /// Position of the first token in its sequence.
    position: usize,
    heads: usize,
    head_dim: usize,
    /// `(context, head_dim)`.
    keys: &'a [f32],
    values: &'a [f32],
}

/// What is known of the scores of a query so far.
#[derive(Clone, Copy)]
struct Softmax {
    largest: f32,
    /// Sum of `exp(score - largest)`.
    total: f32,
}

impl Task<'_> {
    /// `out = softmax(q K^T / sqrt(head_dim)) V` for every query.
    #[inline(always)]
    fn attend<S: Simd>(&self, s: S, out: &mut Block<'_>) {
        let queries = self.tokens.len() * self.heads;
        let mut state = [Softmax { largest: f32::NEG_INFINITY, total: 0.0 }; QUERIES];
        for t in 0..self.tokens.len() {
            out.row(t).fill(0.0);
        }
        // Blocks that all queries see as a whole, and then those that each sees its own part of.
        let whole = (self.position + 1) / BLOCK * BLOCK;
        for start in (0..whole).step_by(BLOCK) {
            let mut q = 0;
            while q + TILE_M <= queries {
                self.block::<S, TILE_M, 2>(s, q, start..start + BLOCK, &mut state, out);
                q += TILE_M;
            }
            while q < queries {
                self.block::<S, 1, 4>(s, q, start..start + BLOCK, &mut state, out);
                q += 1;
            }
        }
        for q in 0..queries {
            let seen = self.position + q / self.heads + 1;
            for start in (whole..seen).step_by(BLOCK) {
                self.block::<S, 1, 4>(s, q, start..seen.min(start + BLOCK), &mut state, out);
            }
            let scale = state[q].total.recip();
            self.query_out(out, q).iter_mut().for_each(|v| *v *= scale);
        }
    }

    /// The part of `out` that a query has.
    #[inline(always)]
    fn query_out<'b>(&self, out: &'b mut Block<'_>, q: usize) -> &'b mut [f32] {
        let start = q % self.heads * self.head_dim;
        &mut out.row(q / self.heads)[start..start + self.head_dim]
    }

    /// Adds a block of keys to M queries, from number q on; their values in N vectors at a time, so that
    /// there are enough sums for the latency of an addition.
    #[inline(always)]
    fn block<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        q: usize,
        keys: Range<usize>,
        state: &mut [Softmax; QUERIES],
        out: &mut Block<'_>,
    ) {
        let (d, n) = (self.head_dim, keys.len());
        let first_col = out.cols().start;
        let mut query = [&[][..]; M];
        for (m, query) in query.iter_mut().enumerate() {
            let start = first_col + (q + m) % self.heads * d;
            let row = self.qkv.row(self.tokens.start + (q + m) / self.heads);
            *query = &row[start..start + d];
        }
        let scale = (d as f32).sqrt().recip();
        let mut scores = [[f32::NEG_INFINITY; BLOCK]; M];
        for i in (0..n).step_by(TILE_N) {
            // Past the last key it stands in for those that are not there.
            let key = |j: usize| &self.keys[(keys.start + (i + j).min(n - 1)) * d..][..d];
            let four = [key(0), key(1), key(2), key(3)];
            let products = tile::<_, M, TILE_N>(Widened(s, PhantomData), query, four, Turn::NEVER);
            let width = TILE_N.min(n - i);
            for (scores, products) in scores.iter_mut().zip(products) {
                for (score, product) in scores[i..i + width].iter_mut().zip(products) {
                    *score = product * scale;
                }
            }
        }
        let mut shrink = [0.0; M];
        for m in 0..M {
            let Softmax { largest, total } = &mut state[q + m];
            shrink[m] = softmax(s, largest, total, &mut scores[m]);
        }
        let mut c = 0;
        while c + N * S::LANES <= d {
            self.add_values::<S, M, N, true>(s, (q, c), &keys, shrink, &scores, out);
            c += N * S::LANES;
        }
        while c < d {
            self.add_values::<S, M, 1, false>(s, (q, c), &keys, shrink, &scores, out);
            c += S::LANES;
        }
    }

    /// `out = shrink out + scores V` in N vectors of columns, from number c on, which are all there where they
    /// are said to be whole.
    #[inline(always)]
    fn add_values<S: Simd, const M: usize, const N: usize, const WHOLE: bool>(
        &self,
        s: S,
        (q, c): (usize, usize),
        keys: &Range<usize>,
        shrink: [f32; M],
        scores: &[[f32; BLOCK]; M],
        out: &mut Block<'_>,
    ) {
        let d = self.head_dim;
        let load = |row: &[f32], n: usize| match WHOLE {
            true => s.load(&row[c + n * S::LANES..]),
            false => s.load_partial(&row[c + n * S::LANES..]),
        };
        let mut sums = [[s.splat(0.0); N]; M];
        for (m, sums) in sums.iter_mut().enumerate() {
            let so_far = self.query_out(out, q + m);
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = s.mul(load(so_far, n), s.splat(shrink[m]));
            }
        }
        let values = self.values[keys.start * d..keys.end * d].chunks_exact(d);
        for (i, value) in values.enumerate() {
            let mut v = [s.splat(0.0); N];
            for (n, v) in v.iter_mut().enumerate() {
                *v = load(value, n);
            }
            for (sums, scores) in sums.iter_mut().zip(scores) {
                let p = s.splat(scores[i]);
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum = s.fma(v, p, *sum);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            let to = self.query_out(out, q + m);
            for (n, sum) in sums.into_iter().enumerate() {
                s.store_partial(sum, &mut to[c + n * S::LANES..]);
            }
        }
    }
}

/// Scores become `exp(score - largest)`, where `largest` is that of all so far. Returns the factor
/// that brings what was summed before to it.
#[inline(always)]
fn softmax<S: Simd>(s: S, largest: &mut f32, total: &mut f32, scores: &mut [f32; BLOCK]) -> f32 {
    let mut max = s.splat(*largest);
    for chunk in scores.chunks_exact(S::LANES) {
        // The second operand comes through if it is NaN.
        max = s.max(max, s.load(chunk));
    }
    let max = s.max_lane(max);
    // Nothing was summed before the first block.
    let shrink = if *largest == f32::NEG_INFINITY { 0.0 } else { (*largest - max).exp() };
    *largest = max;
    let mut sum = s.splat(0.0);
    for chunk in scores.chunks_exact_mut(S::LANES) {
        let p = exp(s, s.sub(s.load(chunk), s.splat(max)));
        sum = s.add(sum, p);
        s.store(p, chunk);
    }
    *total = *total * shrink + s.sum(sum);
    shrink
}
