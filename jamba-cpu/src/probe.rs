//! What the machine does now, to set a model's speed against.

use std::hint::black_box;
use std::time::Instant;

use jamba_core::Result;

use crate::backend;
use crate::simd::{Isa, peak, with_integers, with_simd};
use jamba_core::host::Pages;

/// Elements of the buffer that is read: 1 GiB, more than caches hold.
const ELEMENTS: usize = 1 << 28;
const REPEATS: usize = 5;
/// Rounds of a loop of products, some milliseconds.
const ROUNDS: usize = 1 << 20;

/// Ceilings of the machine, measured with all threads of rayon's pool.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Probe {
    /// Threads.
    pub threads: usize,
    /// Instruction set of the kernels of [`CpuBackend::new`](crate::CpuBackend::new): `amx`,
    /// `avx512bf16`, `avx512`, `avx2` or `portable`.
    pub isa: &'static str,
    /// Reading a buffer of 1 GiB once, in 10^9 bytes a second.
    pub read_gb_per_s: f64,
    /// Fused multiply-adds of f32 in registers, in 10^12 operations a second, two each.
    pub f32_tflop_per_s: f64,
    /// Products of bf16 into f32 in registers, where the machine has an instruction for them (AMX or
    /// AVX-512 BF16), in 10^12 operations a second.
    pub bf16_tflop_per_s: Option<f64>,
    /// Products of bytes into 32 bits in registers, in 10^12 operations a second.
    pub int8_top_per_s: f64,
}

/// Measures the machine: the best of a few repeats. Takes 1 GiB meanwhile, and about a second.
///
/// ```no_run
/// let probe = jamba_cpu::probe()?;
/// // No step that reads weights of 2 GB takes less time than this.
/// println!("{:.0} ms", 2e3 / probe.read_gb_per_s);
/// # Ok::<(), jamba_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Memory`](jamba_core::Error::Memory).
pub fn probe() -> Result<Probe> {
    let isa = backend::wanted().unwrap_or_else(Isa::portable);
    let threads = rayon::current_num_threads();
    let rate = |work: &(dyn Fn() -> usize + Sync)| {
        let operations = || rayon::broadcast(|_| work()).into_iter().sum::<usize>() as f64;
        best_rate(operations) / 1e12
    };
    Ok(Probe {
        threads,
        isa: isa.name(),
        read_gb_per_s: read(isa)?,
        f32_tflop_per_s: rate(&|| with_simd!(isa, s => peak::multiply_adds(s, ROUNDS))),
        bf16_tflop_per_s: peak::bf16_multiply_adds(isa).map(|work| rate(&|| work(ROUNDS))),
        int8_top_per_s: rate(&|| match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(tiles) => tiles.multiply_adds(ROUNDS, true),
            _ => with_integers!(isa, d => peak::integer_multiply_adds(d, ROUNDS)),
        }),
    })
}

/// 10^9 bytes a second.
fn read(isa: Isa) -> Result<f64> {
    use rayon::prelude::*;
    let mut values = Pages::zeros("probe of the memory", ELEMENTS)?;
    let part = ELEMENTS.div_ceil(rayon::current_num_threads());
    // Pages that nothing was written to are all the same page.
    values.par_chunks_mut(part).for_each(|part| part.fill(1.0));
    let bytes = best_rate(|| {
        let sums = values.par_chunks(part).map(|part| with_simd!(isa, s => peak::sum(s, part)));
        black_box(sums.sum::<f32>());
        (4 * ELEMENTS) as f64
    });
    Ok(bytes / 1e9)
}

/// What `work` says that it did, a second, in the fastest of some runs.
fn best_rate(work: impl Fn() -> f64) -> f64 {
    let rates = (0..REPEATS).map(|_| {
        let start = Instant::now();
        work() / start.elapsed().as_secs_f64()
    });
    rates.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_rates() {
        let probe = probe().unwrap();
        assert!(probe.read_gb_per_s > 0.1 && probe.read_gb_per_s < 1e5, "{probe:?}");
        assert!(probe.f32_tflop_per_s > 1e-4 && probe.f32_tflop_per_s < 1e3, "{probe:?}");
        assert!(probe.bf16_tflop_per_s.is_none_or(|rate| rate > 1e-4), "{probe:?}");
        assert!(probe.int8_top_per_s > 1e-4, "{probe:?}");
        assert_eq!(probe.threads, rayon::current_num_threads());
    }
}
