//! What the machine does by itself, to set a model's speed against, and the memory that was taken.

use std::fmt;

use jamba_core::cost::Cost;
use jamba_core::{Config, Limits, Result, WeightFormat};
use serde_json::{Value, json};

use crate::BackendName;

/// The machine under a backend, as measured now.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What it is, and what was measured.
    pub about: String,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Operations a second of the fastest products that the backend could use.
    pub products: f64,
    measured: Value,
}

/// The least time that a cost takes on a machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// That time.
    pub seconds: f64,
    /// `memory` or `products`: what most of it goes to.
    pub by: &'static str,
}

impl Machine {
    /// Measures the machine that a backend runs on, with weights in a format.
    ///
    /// # Errors
    /// [`Error::Memory`](jamba_core::Error::Memory), or what the GPU reports.
    pub fn measure(backend: BackendName, format: WeightFormat) -> Result<Self> {
        match backend {
            BackendName::Cpu => Self::cpu(Some(format)),
            BackendName::CpuF32 | BackendName::Reference => Self::cpu(None),
            BackendName::Cuda => Self::cuda(false),
            BackendName::CudaF32 => Self::cuda(true),
        }
    }

    /// With products as the weights are, or else of f32.
    fn cpu(format: Option<WeightFormat>) -> Result<Self> {
        let probe = jamba_cpu::probe()?;
        let bf16 = probe.bf16_tflop_per_s;
        let products = match format {
            None => probe.f32_tflop_per_s,
            Some(WeightFormat::Stored) => bf16.unwrap_or(probe.f32_tflop_per_s),
            Some(_) => probe.int8_top_per_s,
        };
        let also = bf16.map_or(String::new(), |rate| format!(", of bf16 {rate:.3}"));
        Ok(Self {
            about: format!(
                "{} threads of {}: reads {:.1} GB/s, products of f32 {:.3} TFLOP/s{also}, of int8 {:.3}",
                probe.threads,
                probe.isa,
                probe.read_gb_per_s,
                probe.f32_tflop_per_s,
                probe.int8_top_per_s
            ),
            bandwidth: 1e9 * probe.read_gb_per_s,
            products: 1e12 * products,
            measured: json!({
                "threads": probe.threads,
                "isa": probe.isa,
                "read_gb_per_second": probe.read_gb_per_s,
                "f32_tflop_per_second": probe.f32_tflop_per_s,
                "bf16_tflop_per_second": bf16,
                "int8_top_per_second": probe.int8_top_per_s,
            }),
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda(is_f32: bool) -> Result<Self> {
        let backend =
            crate::cuda(jamba_cuda::Precision::default(), jamba_core::WeightFormat::Stored)?;
        let probe = backend.probe()?;
        let (name, arch) = (backend.device_name(), backend.arch());
        let (what, rate) = match is_f32 {
            true => ("f32", probe.f32_tflop_per_s),
            false => ("bf16", probe.bf16_tflop_per_s),
        };
        Ok(Self {
            about: format!(
                "{name}, {arch}: reads {:.0} GB/s, copies {:.0}, products of {what} {rate:.0} TFLOP/s",
                probe.read_gb_per_s, probe.copy_gb_per_s
            ),
            bandwidth: 1e9 * probe.read_gb_per_s,
            products: 1e12 * rate,
            measured: json!({
                "device": name,
                "arch": arch,
                "read_gb_per_second": probe.read_gb_per_s,
                "copy_gb_per_second": probe.copy_gb_per_s,
                "f32_tflop_per_second": probe.f32_tflop_per_s,
                "bf16_tflop_per_second": probe.bf16_tflop_per_s,
            }),
        })
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_: bool) -> Result<Self> {
        Err(crate::without_cuda())
    }

    /// The least time for steps that follow one another, each as long as the longer of its bytes
    /// and its operations takes.
    pub fn limit(&self, steps: impl IntoIterator<Item = Cost>) -> Limit {
        let (mut seconds, mut of_products) = (0.0, 0.0);
        for step in steps {
            let (memory, products) = (step.bytes / self.bandwidth, step.operations / self.products);
            seconds += memory.max(products);
            of_products += if products > memory { products } else { 0.0 };
        }
        let by = if of_products > seconds / 2.0 { "products" } else { "memory" };
        Limit { seconds, by }
    }

    /// All that was measured.
    pub fn json(&self) -> Value {
        self.measured.clone()
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.about)
    }
}

/// The largest part of the host's memory that this program has taken so far, where the system
/// tells it (Linux).
pub fn host_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kib)
}

/// Runs `work` with every kernel of the GPU timed, and tells them in a table: the time of all
/// launches of a kernel, and what it moves and computes, where that is known. `None` for a backend
/// without a GPU.
///
/// # Errors
/// Those of `work`, or what the GPU reports.
pub fn profile(backend: BackendName, work: impl FnOnce() -> Result<()>) -> Result<Option<String>> {
    match backend {
        #[cfg(feature = "cuda")]
        BackendName::Cuda | BackendName::CudaF32 => {
            use std::fmt::Write;

            let kernels = jamba_cuda::profile(work)?;
            let all: f64 = kernels.iter().map(|kernel| kernel.seconds).sum();
            let mut table = format!(
                "  {:<28} {:>8} {:>8} {:>5} {:>9} {:>7} {:>8}\n",
                "kernel", "launches", "ms", "%", "MB", "GB/s", "TFLOP/s"
            );
            for k in &kernels {
                // What is not told is left empty.
                let told = |v: f64, digits| match v {
                    0.0 => String::new(),
                    v => format!("{v:.digits$}"),
                };
                let _ = writeln!(
                    table,
                    "  {:<28} {:>8} {:>8.3} {:>5.1} {:>9} {:>7} {:>8}",
                    k.name,
                    k.launches,
                    1e3 * k.seconds,
                    100.0 * k.seconds / all,
                    told(k.bytes / 1e6, 1),
                    told(k.bytes / k.seconds / 1e9, 0),
                    told(k.operations / k.seconds / 1e12, 2),
                );
            }
            let _ = writeln!(table, "  {:<28} {:>8} {:>8.3}", "together", "", 1e3 * all);
            Ok(Some(table))
        }
        _ => work().map(|()| None),
    }
}

/// Memory of the GPU that is taken now, by all programs; `None` for a backend without one.
///
/// # Errors
/// What the GPU reports.
pub fn device_used(backend: BackendName) -> Result<Option<u64>> {
    match backend {
        #[cfg(feature = "cuda")]
        BackendName::Cuda | BackendName::CudaF32 => Ok(Some(jamba_cuda::memory_used(0)?)),
        _ => Ok(None),
    }
}

/// What a model and a runner of it take on the device, told before anything is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// All together.
    pub bytes: u64,
    /// What they are for.
    pub about: String,
}

/// The memory that a backend plans with for a model and a runner with these limits; `None` for one
/// that has no plan. Needs no device.
pub fn plan(
    backend: BackendName,
    config: &Config,
    limits: &Limits,
    format: WeightFormat,
) -> Option<Planned> {
    #[cfg(feature = "cuda")]
    if let BackendName::Cuda | BackendName::CudaF32 = backend {
        let precision = match backend {
            BackendName::CudaF32 => jamba_cuda::Precision::F32,
            _ => jamba_cuda::Precision::Bf16,
        };
        let plan = jamba_cuda::Plan::new(config, limits, precision, format);
        return Some(Planned { bytes: plan.total(), about: plan.to_string() });
    }
    let _ = (backend, config, limits, format);
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_of_bytes_and_operations_counts() {
        let machine =
            Machine { about: String::new(), bandwidth: 10.0, products: 100.0, measured: json!({}) };
        let step = |bytes, operations| Cost { bytes, operations };
        let limit = machine.limit([step(20.0, 100.0), step(10.0, 1000.0)]);
        assert_eq!(limit, Limit { seconds: 12.0, by: "products" });
        assert_eq!(machine.limit([step(20.0, 100.0)]).by, "memory");
    }
}
