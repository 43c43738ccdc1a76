//! Weights that are quantised on the device are those that the host makes, to the byte.

use half::{bf16, f16};
use jamba_core::backend::Backend;
use jamba_core::quant::{LIMIT, Scales};
use jamba_core::{Dtype, Error, HostTensor, Layout, Param, Quantized, Role, WeightFormat};
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::{Failed, Trial};

use crate::support::{check, guarded_with, text};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let formats = WeightFormat::ALL.into_iter().filter(|f| *f != WeightFormat::Stored);
    let trials = formats.flat_map(|format| {
        let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
            let name = format!("{precision:?}::{format}::quantised::{name}");
            Trial::test(name, move || guarded_with(precision, format, run))
        };
        let same = (precision == Precision::Bf16).then(|| trial("same_bytes", same_bytes));
        same.into_iter().chain([trial("out_of_range", out_of_range)]).collect::<Vec<_>>()
    });
    trials.collect()
}

/// Weights as trained ones are, and rows of what is rare: zeros, ties, all magnitudes, subnormals.
fn values(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let random = text(seed, rows * cols, 1 << 30);
    let value = |(i, &bits): (usize, &u32)| {
        let unit = bits as f32 / (1 << 29) as f32 - 1.0;
        match i / cols % 8 {
            0 => 0.0,
            1 => (unit * 8.0).round() / 8.0,
            2 => f32::from_bits(bits.wrapping_mul(4)),
            3 if bits % 7 == 0 => 100.0 * unit,
            4 => unit * 1e-38,
            5 => (unit * 127.0).round(),
            _ => unit * unit * unit,
        }
    };
    let values = random.iter().enumerate().map(value);
    // Below the limit in bf16 too.
    values.map(|v: f32| if v.abs() < 0.99 * LIMIT { v } else { 1.0 }).collect()
}

fn stored(dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> HostTensor {
    match dtype {
        Dtype::F32 => HostTensor::from_f32(shape, values.to_vec()),
        Dtype::F16 => {
            let bits = values.iter().map(|&v| f16::from_f32(v.clamp(-6e4, 6e4)).to_bits());
            HostTensor::from_halves(dtype, shape, bits.collect())
        }
        Dtype::Bf16 => {
            let bits = values.iter().map(|&v| bf16::from_f32(v).to_bits());
            HostTensor::from_halves(dtype, shape, bits.collect())
        }
    }
}

fn same_bytes(backend: CudaBackend) -> Result<(), Failed> {
    let format = backend.weight_format();
    let mut compared = 0;
    for role in [Role::Embedding, Role::Linear, Role::Experts, Role::Mlp] {
        let Layout::Packed(packing) = format.layout(role) else { continue };
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            // Longer than what is quantised at a time, for one of them.
            for (rows, cols) in [(64, 1), (48, 31), (40, 100), (33, 4096), (1100, 4100)] {
                let all = values(rows, cols, cols as u64);
                let (upper, lower) = all.split_at(rows / 3 * cols);
                let part = |values: &[f32]| stored(dtype, vec![values.len() / cols, cols], values);
                let parts = vec![part(upper), part(lower)];
                let name = format!("{role:?} of {dtype}, ({rows}, {cols})");
                let param = Param { name: name.clone(), role, shape: vec![rows, cols], parts };
                let expected = Quantized::new(&param, packing)?;
                let weight = backend.upload(param)?;
                let [quants, scales] = weight.quantized(&backend)?.ok_or("it is not quantised")?;
                check(quants == expected.quants(), format!("{name}: other quants"))?;
                let expected: Vec<u8> = match expected.scales() {
                    Scales::Rows(rows) => rows.iter().flat_map(|s| s.to_le_bytes()).collect(),
                    Scales::Blocks(blocks) => blocks.iter().flat_map(|s| s.to_le_bytes()).collect(),
                };
                check(scales == expected, format!("{name}: other scales"))?;
                compared += 1;
            }
        }
    }
    check(compared >= 30, format!("only {compared} matrices were compared"))
}

/// The first weight that has no scale is named, as on the host.
fn out_of_range(backend: CudaBackend) -> Result<(), Failed> {
    for bad in [f32::NAN, f32::INFINITY, -LIMIT] {
        let mut values = values(40, 100, 3);
        [values[17 * 100 + 33], values[39 * 100 + 2]] = [bad, bad];
        let (upper, lower) = values.split_at(1000);
        let part = |values: &[f32]| stored(Dtype::F32, vec![values.len() / 100, 100], values);
        let parts = vec![part(upper), part(lower)];
        let param = Param { name: "w".into(), role: Role::Mlp, shape: vec![40, 100], parts };
        match backend.upload(param).err() {
            Some(Error::WeightRange { name, row: 17, column: 33, value })
                if name == "w" && value.to_bits() == bad.to_bits() => {}
            other => return Err(format!("{bad}: {other:?}").into()),
        }
    }
    Ok(())
}
