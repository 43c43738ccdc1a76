//! What the card does now, to set a model's speed against.
#![allow(unsafe_code, reason = "launches a kernel, calls cuBLASLt")]

use crate::backend::CudaBackend;
use crate::device::{Device, Grid, driver_error};
use crate::error::Result;
use crate::kernels::Unit;
use crate::ops;
use crate::ops::cublas::{CublasLt, Product};
use crate::options::{Precision, element_bytes};

/// Rows and columns of the operands of the product.
const SIDE: usize = 8192;
/// Bytes read or copied at a time.
const BYTES: usize = 2 << 30;
const REPEATS: usize = 8;

/// Ceilings of the card, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Probe {
    /// Reading 2 GiB of the device's memory, in 10^9 bytes a second.
    pub read_gb_per_s: f64,
    /// A copy of 2 GiB within the device, bytes read plus bytes written, in 10^9 bytes a second.
    pub copy_gb_per_s: f64,
    /// A product of two 8192 x 8192 matrices of random bf16, in 10^12 operations a second.
    pub bf16_tflop_per_s: f64,
    /// The same of f32, without TF32.
    pub f32_tflop_per_s: f64,
}

/// Bytes of a card's memory that are taken now, by all programs.
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) without a driver,
/// [`Error::NoDevice`](crate::Error::NoDevice), [`Error::Driver`](crate::Error::Driver).
pub fn memory_used(ordinal: usize) -> Result<u64> {
    let (free, total) = Device::open(ordinal, None)?.memory()?;
    Ok((total - free) as u64)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReadArgs {
    x: u64,
    out: u64,
    n: u64,
}

pub(crate) fn unit() -> Unit {
    ops::plain("probe", include_str!("../kernels/probe.cu"))
}

impl CudaBackend {
    /// Measures the card: the median of a few repeats. Takes 4 GiB of its memory meanwhile.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::Driver`](crate::Error::Driver).
    pub fn probe(&self) -> Result<Probe> {
        let device = &*self.device;
        let (from, mut to) = (device.alloc(BYTES)?, device.alloc(BYTES)?);
        let copy = median_seconds(device, || device.copy(&from, &mut to, BYTES))?;
        let module = self.loader.module(&unit())?;
        let kernel = module.kernel("read")?;
        let args = ReadArgs { x: from.ptr(), out: to.ptr(), n: BYTES as u64 / 16 };
        let read = median_seconds(device, || {
            let grid = Grid::new("read", [4 * device.multiprocessors(), 1, 1], 512, 0)?;
            // SAFETY: x has n words of 16 bytes, out more than one of 4.
            unsafe { device.launch(&kernel, &grid, &args) }
        })?;
        drop((from, to));
        Ok(Probe {
            read_gb_per_s: BYTES as f64 / read / 1e9,
            copy_gb_per_s: 2.0 * BYTES as f64 / copy / 1e9,
            bf16_tflop_per_s: products(device, Precision::Bf16)? / 1e12,
            f32_tflop_per_s: products(device, Precision::F32)? / 1e12,
        })
    }
}

/// Operations a second of a large product.
fn products(device: &Device, precision: Precision) -> Result<f64> {
    let elements = SIDE * SIDE;
    let size = element_bytes(precision);
    let random = |seed| match precision {
        Precision::Bf16 => random_bf16(elements, seed),
        Precision::F32 => random_f32(elements, seed),
    };
    let [mut x, mut w, out] = [
        device.alloc(size * elements)?,
        device.alloc(size * elements)?,
        device.alloc(4 * elements)?,
    ];
    device.upload(&mut x, 0, &random(1))?;
    device.upload(&mut w, 0, &random(2))?;
    let ld = SIDE as u32;
    let rounded = false;
    let product = Product { rows: SIDE, n: SIDE, k: SIDE, ldx: ld, ldw: ld, ldo: ld, rounded };
    let mut cublas = CublasLt::new(device, precision)?;
    let seconds = median_seconds(device, || {
        // SAFETY: the operands are SIDE x SIDE of the precision's elements, the result as many f32.
        unsafe { cublas.matmul(device, product, x.ptr(), w.ptr(), out.ptr()) }
    })?;
    Ok(2.0 * (SIDE as f64).powi(3) / seconds)
}

fn median_seconds(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..REPEATS {
        let start = device.event()?;
        work()?;
        let end = device.event()?;
        let milliseconds = start.elapsed_ms(&end).map_err(driver_error("timing"))?;
        seconds.push(f64::from(milliseconds) / 1e3);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[REPEATS / 2])
}

/// Values of magnitude 1/2 to 2 and random sign and mantissa.
fn random_bf16(n: usize, seed: u64) -> Vec<u8> {
    bits(seed).take(n).flat_map(|bits| ((bits as u16 & 0x80ff) | 0x3f00).to_le_bytes()).collect()
}

/// The same in f32.
fn random_f32(n: usize, seed: u64) -> Vec<u8> {
    bits(seed).take(n).flat_map(|bits| ((bits & 0x80ff_ffff) | 0x3f00_0000).to_le_bytes()).collect()
}

fn bits(seed: u64) -> impl Iterator<Item = u32> {
    let next = |state: &u64| {
        Some(state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407))
    };
    std::iter::successors(Some(seed), next).skip(1).map(|state| (state >> 32) as u32)
}
