//! Matrix products of all numbers of rows, beside the speed at which this machine reads memory.
//! `cargo bench -p jamba-cpu [-- ISA] [NAME..]`, of all products or those whose name begins so;
//! RAYON_NUM_THREADS sets the threads.

use std::hint::black_box;
use std::time::Instant;

use jamba_core::{Backend, Cols, Dtype, HostTensor, Param, Precision, Result, Role, WeightFormat};
use jamba_cpu::CpuBackend;

/// `[n, k]`: in and out of the MLP of Reasoning-3B, the same of the demo model.
const SHAPES: [[usize; 2]; 4] = [[16384, 2560], [2560, 8192], [1024, 256], [256, 512]];
const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 128, 512];

fn main() -> Result<()> {
    let mut names: Vec<_> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let backends = CpuBackend::all();
    let wanted = names.first().and_then(|isa| backends.iter().find(|b| b.isa() == isa));
    let backend = wanted.unwrap_or(&backends[0]);
    names.drain(..usize::from(wanted.is_some()));
    println!("{backend:?}, {} threads", rayon::current_num_threads());
    for shape @ [n, k] in SHAPES {
        println!("{n} x {k}: memory is read at {:.1} GB/s", read_probe());
        for (dtype, precision, format) in [
            (Dtype::Bf16, Precision::Bf16, WeightFormat::Stored),
            (Dtype::Bf16, Precision::F32, WeightFormat::Stored),
            (Dtype::F16, Precision::F32, WeightFormat::Stored),
            (Dtype::F32, Precision::F32, WeightFormat::Stored),
            (Dtype::Bf16, Precision::Bf16, WeightFormat::Int8),
            (Dtype::Bf16, Precision::Bf16, WeightFormat::Int4),
        ] {
            let backend = backend.clone().with_precision(precision).with_format(format);
            let name = match format {
                WeightFormat::Stored => format!("{dtype} x {precision}"),
                format => format!("{format} x int8"),
            };
            if names.is_empty() || names.iter().any(|wanted| name.starts_with(wanted)) {
                products(&backend, &name, backend.upload(weight(shape, dtype))?, shape)?;
            }
        }
    }
    Ok(())
}

fn products<B: Backend>(b: &B, name: &str, weight: B::Weight, [n, k]: [usize; 2]) -> Result<()> {
    print!("{name:>12}:");
    for rows in ROWS {
        let (mut x, mut out) = (b.alloc(rows, k)?, b.alloc(rows, n)?);
        let values: Vec<f32> =
            (0..rows * k).map(|i| (i * 7919 % 127) as f32 / 64.0 - 1.0).collect();
        b.write(&mut x, &values)?;
        let seconds = least(|| b.linear(Cols { tensor: &x, cols: 0..k }, &weight, None, &mut out))?;
        let gflops = 2.0 * (rows * n * k) as f64 / seconds / 1e9;
        if rows == 1 {
            print!(
                "  1: {:.1} us {:.1} Gweights/s |",
                1e6 * seconds,
                (n * k) as f64 / seconds / 1e9
            );
        } else {
            print!("  {rows}: {gflops:.0}");
        }
    }
    println!("  GFLOP/s");
    Ok(())
}

fn weight(shape @ [n, k]: [usize; 2], dtype: Dtype) -> Param {
    let value = |i: usize| ((i * 7919 % 1009) as f32 / 504.0 - 1.0) / 64.0;
    let values = (0..n * k).map(value);
    let tensor = match dtype {
        Dtype::F32 => HostTensor::from_f32(shape.to_vec(), values.collect()),
        Dtype::F16 => {
            let bits = values.map(|v| half::f16::from_f32(v).to_bits()).collect();
            HostTensor::from_halves(dtype, shape.to_vec(), bits)
        }
        Dtype::Bf16 => {
            let bits = values.map(|v| half::bf16::from_f32(v).to_bits()).collect();
            HostTensor::from_halves(dtype, shape.to_vec(), bits)
        }
    };
    Param::new("weight", Role::Linear, tensor)
}

/// Least time of several runs, after one that does not count.
fn least(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let (mut least, begin) = (f64::INFINITY, Instant::now());
    for run in 0.. {
        let start = Instant::now();
        work()?;
        least = least.min(start.elapsed().as_secs_f64());
        if run > 2 && begin.elapsed().as_secs_f64() > 0.25 {
            break;
        }
    }
    Ok(least)
}

/// GB/s of all threads reading, each its part of 512 MiB.
fn read_probe() -> f64 {
    let memory = vec![1u64; 64 << 20];
    let threads = rayon::current_num_threads();
    let seconds = least(|| {
        std::thread::scope(|scope| {
            for part in memory.chunks(memory.len().div_ceil(threads)) {
                scope.spawn(move || {
                    let sums = part.chunks_exact(64).fold([0u64; 64], |mut sums, chunk| {
                        sums.iter_mut().zip(chunk).for_each(|(s, c)| *s = s.wrapping_add(*c));
                        sums
                    });
                    black_box(sums)
                });
            }
        });
        Ok(())
    });
    (memory.len() * 8) as f64 / seconds.unwrap_or(f64::INFINITY) / 1e9
}
