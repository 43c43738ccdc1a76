//! Random weights drawn on the device are those of the host, to the bit.

use half::bf16;
use jamba_core::backend::{Backend, Cols};
use jamba_core::random::Draw;
use jamba_core::{Dtype, HostTensor, Param, Role};
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::{Failed, Trial};

use crate::support::{check, guarded};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let run = move || guarded(precision, as_the_host);
    vec![Trial::test(format!("{precision:?}::drawn::as_the_host"), run)]
}

fn as_the_host(b: CudaBackend) -> Result<(), Failed> {
    for dtype in [Dtype::Bf16, Dtype::F32, Dtype::F16] {
        for (rows, cols) in [(1, 1), (5, 17), (33, 40), (700, 256)] {
            let part = |rows, state| {
                let draw = Draw { state, scale: 0.37 };
                HostTensor::drawn(dtype, vec![rows, cols], draw)
            };
            // Counters that pass 2^64 among them.
            let parts = vec![part(rows, u64::MAX / 3), part(2 * rows, 7)];
            let (name, shape) = (format!("{dtype} ({rows}, {cols})"), vec![3 * rows, cols]);
            let param = Param { name: name.clone(), role: Role::Linear, shape, parts };
            let mut expected = param.to_f32();
            if b.precision() == Precision::Bf16 {
                expected.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            }
            // The product with the unit matrix is the transposed weight, exactly.
            let weight = b.upload(param)?;
            let mut unit = vec![0.0; cols * cols];
            unit.iter_mut().step_by(cols + 1).for_each(|v| *v = 1.0);
            let (mut x, mut out) = (b.alloc(cols, cols)?, b.alloc(cols, 3 * rows)?);
            b.write(&mut x, &unit)?;
            b.linear(Cols { tensor: &x, cols: 0..cols }, &weight, None, &mut out)?;
            let got = b.read(Cols { tensor: &out, cols: 0..3 * rows })?;
            for (i, expected) in expected.iter().enumerate() {
                let (row, col) = (i / cols, i % cols);
                let got = got[col * 3 * rows + row];
                check(got == *expected, format!("{name}: {got}, not {expected}, at {row}, {col}"))?;
            }
        }
    }
    Ok(())
}
