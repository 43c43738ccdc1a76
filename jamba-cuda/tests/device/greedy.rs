//! Tokens chosen on the device are those that the host would choose.

use jamba_core::backend::Backend;
use jamba_core::sampler::greedy;
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::{Failed, Trial};

use crate::support::{check, guarded, text};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
        Trial::test(format!("{precision:?}::greedy::{name}"), move || guarded(precision, run))
    };
    vec![trial("as_the_host", as_the_host), trial("not_finite", not_finite)]
}

fn values(rows: usize, cols: usize) -> Vec<f32> {
    let ids = text(cols as u64, rows * cols, 1 << 20);
    ids.into_iter().map(|id| id as f32 / f32::from(1u16 << 15) - 16.0).collect()
}

fn as_the_host(b: CudaBackend) -> Result<(), Failed> {
    for (rows, cols) in [(0, 7), (1, 1), (3, 101), (5, 1024), (64, 65_536)] {
        let mut values = values(rows, cols);
        for (r, row) in values.chunks_exact_mut(cols).enumerate() {
            // The largest several times: the lowest of them is meant.
            let first = r * 7919 % cols;
            row[first..].iter_mut().step_by(97).for_each(|v| *v = 17.0);
        }
        let mut x = b.alloc(rows, cols)?;
        b.write(&mut x, &values)?;
        let chosen = b.greedy(&x)?;
        check(chosen.len() == rows, format!("{} rows instead of {rows}", chosen.len()))?;
        for (row, got) in values.chunks_exact(cols).zip(chosen) {
            let (got, expected) = (got.ok_or("none")?, greedy(row).ok_or("none on the host")?);
            let off = (got.logprob - expected.logprob).abs();
            let close = off <= 1e-5 * expected.logprob.abs().max(1.0);
            check(got.id == expected.id && close, format!("{got:?}, not {expected:?}"))?;
        }
    }
    Ok(())
}

/// One value that is not finite makes its row unusable, and no other.
fn not_finite(b: CudaBackend) -> Result<(), Failed> {
    let (rows, cols) = (4, 2000);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 1023, 1999] {
            let mut values = values(rows, cols);
            values[2 * cols + at] = bad;
            let mut x = b.alloc(rows, cols)?;
            b.write(&mut x, &values)?;
            let is_some: Vec<bool> = b.greedy(&x)?.iter().map(Option::is_some).collect();
            check(is_some == [true, true, false, true], format!("{bad} at {at}: {is_some:?}"))?;
        }
    }
    Ok(())
}
