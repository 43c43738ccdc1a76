//! Kernels that do what none may, so that what follows can be tested.
#![allow(unsafe_code, reason = "launches a kernel")]

use crate::backend::CudaBackend;
use crate::device::Grid;
use crate::error::Result;
use crate::kernels::Unit;
use crate::tensor::Tensor;

const SOURCE: &str = r#"
extern "C" __global__ void fail(const u32 unused) { asm("trap;"); }
extern "C" __global__ void write_one(float* const at) { *at = 1.0f; }
"#;

impl CudaBackend {
    /// Launches a kernel that fails. No device of this process can be used afterwards.
    #[doc(hidden)]
    pub fn trap(&self) -> Result<()> {
        let unit = Unit { stem: "trap", source: SOURCE, defines: Vec::new() };
        let kernel = self.loader.module(&unit)?.kernel("fail")?;
        let grid = Grid::new("trap", [1, 1, 1], 1, 0)?;
        // SAFETY: the kernel takes a u32 and touches no memory.
        unsafe { self.device.launch(&kernel, &grid, &0u32) }
    }

    /// Writes to the element after the last of what a tensor is allocated for.
    #[doc(hidden)]
    pub fn overrun(&self, x: &mut Tensor) -> Result<()> {
        if !self.device.is_guarded() {
            return Ok(());
        }
        let unit = Unit { stem: "trap", source: SOURCE, defines: Vec::new() };
        let kernel = self.loader.module(&unit)?.kernel("write_one")?;
        let grid = Grid::new("overrun", [1, 1, 1], 1, 0)?;
        let end = x.ptr() + 4 * (x.capacity() * x.cols()) as u64;
        // SAFETY: there are guards after an allocation, which belong to it.
        unsafe { self.device.launch(&kernel, &grid, &end) }
    }
}
