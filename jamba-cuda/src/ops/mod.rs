//! Launchers, one file per kernel source. In each: the kernel's arguments as they are laid out in
//! CUDA C++, the kernels of the source, and for every launch its checks and one `unsafe` call.
//!
//! Callers in [`backend`](crate::backend) have checked the shapes against each other
//! ([`jamba_core::shape`]) and set the rows of the result; here the rest is checked: what sizes a
//! kernel is made for, alignment, and that the grid exists.

pub(crate) mod attention;
pub(crate) mod attention_groups;
pub(crate) mod attention_step;
pub(crate) mod conv1d;
pub(crate) mod cublas;
pub(crate) mod draw;
pub(crate) mod elementwise;
pub(crate) mod embed;
pub(crate) mod few;
mod few_groups;
pub(crate) mod grouped;
pub(crate) mod linear;
pub(crate) mod moe;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod quant;
pub(crate) mod rows;
pub(crate) mod sample;
pub(crate) mod scan;
pub(crate) mod scan_step;
mod tensor_map;
pub(crate) mod workspace;

use jamba_core::WeightFormat;

use crate::kernels::Unit;
use crate::options::Precision;
use crate::probe;

/// The sources that do not depend on the sizes of a model.
pub(crate) fn units(precision: Precision, format: WeightFormat, arch: &str) -> Vec<Unit> {
    let mut units = vec![
        draw::unit(),
        elementwise::unit(),
        embed::unit(),
        linear::unit(),
        norm::unit(),
        probe::unit(),
        quant::unit(),
        rows::unit(),
        sample::unit(),
    ];
    units.extend(moe::units());
    units.extend(few::units(precision, format));
    units.extend(few_groups::units(precision, format, arch));
    units.extend(packed::units(precision, format, arch));
    units
}

/// A unit without sizes.
pub(crate) fn plain(stem: &'static str, source: &'static str) -> Unit {
    Unit { stem, source, defines: Vec::new() }
}
