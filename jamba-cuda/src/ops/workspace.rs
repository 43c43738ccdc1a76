//! Device memory between the kernels of one operator.

use crate::device::{Buffer, Device};
use crate::error::Result;

/// Memory that grows to the largest size asked for. A backend keeps its workspaces behind a lock
/// that is held until all kernels that use them are on the stream: whoever comes next is ordered
/// after them.
#[derive(Default)]
pub(crate) struct Workspace(Option<Buffer>);

impl Workspace {
    /// At least this many bytes; what they hold is arbitrary.
    pub(crate) fn reserve(&mut self, device: &Device, bytes: usize) -> Result<u64> {
        match &self.0 {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.ptr()),
            _ => {
                // Freed first, so that both need not fit together.
                self.0 = None;
                let mut buffer = device.alloc(bytes)?;
                device.poison(&mut buffer)?;
                let ptr = buffer.ptr();
                self.0 = Some(buffer);
                Ok(ptr)
            }
        }
    }

    /// Bytes allocated so far.
    pub(crate) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, Buffer::bytes)
    }

    /// Reads what kernels wrote to its beginning.
    pub(crate) fn read(&self, device: &Device, to: &mut [u8]) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |buffer| device.download(buffer, 0, to))
    }
}

/// The workspaces of all operators.
#[derive(Default)]
pub(crate) struct Workspaces {
    /// Operand of a matrix product, rounded to bf16.
    pub(crate) cast: Workspace,
    /// Results of attention for parts of the keys.
    pub(crate) parts: Workspace,
    /// Which token goes to which expert.
    pub(crate) routes: Workspace,
    /// Activations of the experts.
    pub(crate) act: Workspace,
    /// Results of the experts.
    pub(crate) expert_out: Workspace,
    /// Dequantised weights of a large product.
    pub(crate) dense: Workspace,
}

impl Workspaces {
    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        let Self { cast, parts, routes, act, expert_out, dense } = self;
        [cast, parts, routes, act, expert_out, dense].into_iter().filter_map(|w| w.0.as_ref())
    }

    /// Bytes allocated so far.
    pub(crate) fn bytes(&self) -> usize {
        self.buffers().map(Buffer::bytes).sum()
    }

    /// Tell the allocations from all others.
    pub(crate) fn ids(&self) -> impl Iterator<Item = u64> {
        self.buffers().map(Buffer::id)
    }
}
