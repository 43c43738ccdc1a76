//! From the sources under `kernels/` to functions on the card.

use std::sync::Arc;

use cudarc::driver::CudaModule;
use jamba_core::schedule::Schedule;
use jamba_core::{Config, WeightFormat};

use crate::cache::Cache;
use crate::device::{Device, Kernel};
use crate::error::{Error, Result};
use crate::nvrtc;
use crate::ops;
use crate::options::{KernelCache, Precision};

/// Helpers that every kernel source starts with.
const COMMON: &str = include_str!("../kernels/common.cuh");

/// One source and the sizes that it is specialised to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) stem: &'static str,
    pub(crate) source: &'static str,
    pub(crate) defines: Vec<(&'static str, usize)>,
}

impl Unit {
    fn text(&self) -> String {
        format!("{COMMON}\n#line 1 \"{}.cu\"\n{}", self.stem, self.source)
    }

    fn flags(&self, arch: &str, precision: Precision) -> Vec<String> {
        let mut flags = vec![
            format!("--gpu-architecture={arch}"),
            "--std=c++17".into(),
            format!("-DBF16={}", u8::from(precision == Precision::Bf16)),
        ];
        flags.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        flags
    }

    fn compile(&self, arch: &str, precision: Precision, cache: &Cache) -> Result<Vec<u8>> {
        let (text, flags) = (self.text(), self.flags(arch, precision));
        let (major, minor) = nvrtc::version()?;
        let version = format!("NVRTC {major}.{minor}");
        let mut key = vec![version.as_str(), &text];
        key.extend(flags.iter().map(String::as_str));
        let source = nvrtc::Source { stem: self.stem, text: &text, arch, flags: &flags };
        cache.get(self.stem, &key, || nvrtc::compile(&source))
    }
}

/// The sources that a model of `config` needs, in its sizes.
fn units(
    config: &Config,
    precision: Precision,
    format: WeightFormat,
    arch: &str,
) -> Result<Vec<Unit>> {
    let schedule = Schedule::new(config);
    let mut units = ops::units(precision, format, arch);
    if ops::grouped::is_for(arch, precision) {
        units.push(ops::grouped::unit());
    }
    if schedule.mamba_layers() > 0 {
        units.push(ops::conv1d::unit(config.mamba_d_conv)?);
        let d_state = config.mamba_d_state;
        units.push(ops::scan::unit(d_state)?);
        units.push(ops::scan_step::unit(d_state, config.mamba_dt_rank, precision)?);
    }
    if schedule.attention_layers() > 0 {
        units.push(ops::attention::unit(config.head_dim)?);
        if ops::attention_step::fits(config.head_dim, precision) {
            units.push(ops::attention_step::unit(config.head_dim));
        }
        if ops::attention_groups::is_for(arch, precision, config.head_dim) {
            units.push(ops::attention_groups::unit(config.head_dim));
        }
    }
    Ok(units)
}

/// A kernel source compiled for an architecture.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// File name of the source without its ending, and the sizes it was specialised to.
    pub name: String,
    /// Bytes of machine code.
    pub bytes: usize,
}

/// Compiles every kernel that a model of `config` needs, for an architecture such as `sm_90a`, and
/// keeps them in the cache, from where a backend loads them: needs NVRTC, but no card.
///
/// # Errors
/// [`Error::Missing`] without NVRTC, [`Error::Compile`], [`Error::Size`].
pub fn compile(
    config: &Config,
    precision: Precision,
    format: WeightFormat,
    arch: &str,
    cache: &KernelCache,
) -> Result<Vec<Compiled>> {
    let cache = Cache::new(cache.folder());
    let compile = |unit: Unit| {
        let sizes = unit.defines.iter().map(|(name, value)| format!(" {name}={value}"));
        let name = format!("{}{}", unit.stem, sizes.collect::<String>());
        Ok(Compiled { name, bytes: unit.compile(arch, precision, &cache)?.len() })
    };
    units(config, precision, format, arch)?.into_iter().map(compile).collect()
}

/// Compiles for one card and loads into it.
pub(crate) struct Loader {
    pub(crate) device: Arc<Device>,
    pub(crate) precision: Precision,
    pub(crate) format: WeightFormat,
    arch: String,
    cache: Cache,
}

impl Loader {
    pub(crate) fn new(
        device: Arc<Device>,
        precision: Precision,
        format: WeightFormat,
        cache: Cache,
    ) -> Result<Self> {
        let (major, minor) = device.capability();
        let refuse = |reason: &str| Error::Architecture {
            card: device.name().into(),
            arch: format!("sm_{major}{minor}"),
            reason: reason.into(),
        };
        if major < 8 {
            return Err(refuse("bf16 tensor cores are needed, which sm_80 and later have"));
        }
        // The variant with the features of this architecture alone, where there is one.
        let variant = if (major, minor) == (9, 0) { "a" } else { "" };
        let arch = format!("sm_{major}{minor}{variant}");
        Ok(Self { device, precision, format, arch, cache })
    }

    /// The architecture compiled for.
    pub(crate) fn arch(&self) -> &str {
        &self.arch
    }

    /// Compiles a source and loads it.
    pub(crate) fn module(&self, unit: &Unit) -> Result<Module> {
        let cubin = unit.compile(&self.arch, self.precision, &self.cache)?;
        let module = self.device.load(cubin)?;
        Ok(Module { device: self.device.clone(), module })
    }
}

/// A loaded source.
pub(crate) struct Module {
    device: Arc<Device>,
    module: Arc<CudaModule>,
}

impl Module {
    /// The kernel of this name.
    pub(crate) fn kernel(&self, name: &'static str) -> Result<Kernel> {
        self.kernel_with_shared(name, 0)
    }

    /// The kernel of this name, which begins early: it calls `await_inputs` of common.cuh.
    pub(crate) fn overlapping(&self, name: &'static str) -> Result<Kernel> {
        self.overlapping_with_shared(name, 0)
    }

    /// As [`overlapping`](Self::overlapping), with up to `shared` bytes of dynamic shared memory.
    pub(crate) fn overlapping_with_shared(
        &self,
        name: &'static str,
        shared: usize,
    ) -> Result<Kernel> {
        Ok(self.kernel_with_shared(name, shared)?.overlapping(&self.device))
    }

    /// The kernel of this name, launched with up to `shared` bytes of dynamic shared memory.
    pub(crate) fn kernel_with_shared(&self, name: &'static str, shared: usize) -> Result<Kernel> {
        Kernel::new(&self.device, &self.module, name, shared)
    }
}
