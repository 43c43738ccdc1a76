//! Memory of the card, and what is copied to it and from it.
#![allow(unsafe_code, reason = "calls into the CUDA driver")]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result};

use super::{Device, Overruns, driver_error};
use crate::error::{Error, Result};

/// Bytes before and after a guarded allocation, and what they hold.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;

impl Device {
    /// Memory of zeros.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<Buffer> {
        // An allocation of nothing is an error to the driver.
        let len = bytes.max(16);
        let guard = if self.guards.is_some() { GUARD } else { 0 };
        // SAFETY: every byte is written by a memset below, before anything can read it.
        let slice = unsafe { self.stream.alloc::<u8>(len.saturating_add(2 * guard)) };
        let slice = slice.map_err(|e| match (e.0, self.memory()) {
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => {
                Error::OutOfMemory { bytes, free, total }
            }
            _ => driver_error("allocating memory")(e),
        })?;
        let ptr = slice.device_ptr(&self.stream).0 + guard as u64;
        static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
        let id = ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let mut buffer = Buffer { slice, ptr, bytes, id, guards: None };
        if let Some(overruns) = &self.guards {
            self.fill(buffer.ptr - GUARD as u64, GUARD_BYTE, len + 2 * GUARD)?;
            buffer.guards = Some((self.stream.clone(), overruns.clone()));
        }
        self.fill(buffer.ptr, 0, if guard > 0 { bytes } else { len })?;
        Ok(buffer)
    }

    fn fill(&self, ptr: u64, value: u8, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: called with ranges of allocations of this device only.
        let filled = unsafe { result::memset_d8_async(ptr, value, bytes, self.stream.cu_stream()) };
        filled.map_err(driver_error("filling memory"))
    }

    /// Makes what is not written yet conspicuous, where allocations are guarded: as f32 and as
    /// bf16 it is NaN.
    pub(crate) fn poison(&self, buffer: &mut Buffer) -> Result<()> {
        match self.guards {
            Some(_) if buffer.bytes > 0 => self.fill(buffer.ptr, 0xff, buffer.bytes),
            _ => Ok(()),
        }
    }

    /// Fills a range of bytes with zeros.
    pub(crate) fn zero(&self, buffer: &mut Buffer, range: Range<usize>) -> Result<()> {
        buffer.check(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.fill(buffer.ptr + range.start as u64, 0, range.len())
    }

    /// Copies to the device. The source may change as soon as this returns.
    pub(crate) fn upload(&self, dst: &mut Buffer, offset: usize, src: &[u8]) -> Result<()> {
        let range = offset..offset.saturating_add(src.len());
        dst.check(&range)?;
        if src.is_empty() {
            return Ok(());
        }
        let range = dst.within_slice(&range);
        let Some(mut view) = dst.slice.try_slice_mut(range.clone()) else {
            return Err(dst.beyond(&range));
        };
        self.stream.memcpy_htod(src, &mut view).map_err(driver_error("copying to the device"))
    }

    /// Copies from the device, after all work given so far.
    pub(crate) fn download(&self, src: &Buffer, offset: usize, dst: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(dst.len());
        src.check(&range)?;
        let range = src.within_slice(&range);
        let Some(view) = src.slice.try_slice(range.clone()) else { return Err(src.beyond(&range)) };
        if !dst.is_empty() {
            let copied = self.stream.memcpy_dtoh(&view, dst);
            copied.map_err(driver_error("copying from the device"))?;
        }
        self.synchronize()
    }

    /// Copies from the start of one buffer to that of another.
    pub(crate) fn copy(&self, src: &Buffer, dst: &mut Buffer, bytes: usize) -> Result<()> {
        src.check(&(0..bytes))?;
        dst.check(&(0..bytes))?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both buffers have so many bytes, as checked above, and are different ones.
        let copied =
            unsafe { result::memcpy_dtod_async(dst.ptr, src.ptr, bytes, self.stream.cu_stream()) };
        copied.map_err(driver_error("copying on the device"))
    }

    /// Copies `bytes` within a buffer, from one offset to another; the two must not overlap.
    pub(crate) fn copy_within(
        &self,
        buffer: &mut Buffer,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<()> {
        for start in [from, to] {
            buffer.check(&(start..start.saturating_add(bytes)))?;
        }
        if bytes == 0 || from == to {
            return Ok(());
        }
        self.bind()?;
        let (from, to) = (buffer.ptr + from as u64, buffer.ptr + to as u64);
        // SAFETY: both ranges lie within the buffer, as checked above.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        copied.map_err(driver_error("copying on the device"))
    }
}

/// Memory on the device, freed in stream order when dropped.
pub(crate) struct Buffer {
    slice: CudaSlice<u8>,
    ptr: u64,
    bytes: usize,
    id: u64,
    /// To look at the bytes around it.
    guards: Option<(Arc<CudaStream>, Overruns)>,
}

impl Buffer {
    /// Its address on the device.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Tells it from every other allocation, also from later ones at its address.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    fn beyond(&self, range: &Range<usize>) -> Error {
        Error::Range { range: range.clone(), allocated: self.bytes }
    }

    fn check(&self, range: &Range<usize>) -> Result<()> {
        if range.end > self.bytes { Err(self.beyond(range)) } else { Ok(()) }
    }

    fn within_slice(&self, range: &Range<usize>) -> Range<usize> {
        let guard = if self.guards.is_some() { GUARD } else { 0 };
        range.start + guard..range.end + guard
    }

    /// Whether the bytes around the allocation are as they were, as far as the device can tell.
    fn is_intact(&self, stream: &Arc<CudaStream>) -> bool {
        let after = GUARD + self.bytes;
        [0..GUARD, after..after + GUARD].into_iter().all(|range| {
            let mut bytes = [GUARD_BYTE; GUARD];
            let Some(view) = self.slice.try_slice(range) else { return false };
            let read = stream.memcpy_dtoh(&view, &mut bytes).and_then(|()| stream.synchronize());
            read.is_err() || bytes == [GUARD_BYTE; GUARD]
        })
    }

    /// Its size as asked for.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some((stream, overruns)) = &self.guards
            && !self.is_intact(stream)
        {
            overruns.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Page-locked host memory of 32-bit words that is copied to the device again and again.
pub(crate) struct Staging {
    words: PinnedHostSlice<u32>,
    /// After the latest copy.
    copied: CudaEvent,
}

impl Staging {
    pub(crate) fn new(device: &Device, words: usize) -> Result<Self> {
        // SAFETY: u32 has no invalid values, and only what was written is ever copied.
        let words = unsafe { device.ctx.alloc_pinned::<u32>(words.max(1)) };
        let words = words.map_err(driver_error("allocating page-locked memory"))?;
        Ok(Self { words, copied: device.event()? })
    }

    /// Fills the first `len` words and copies them to the start of `dst`.
    pub(crate) fn upload(
        &mut self,
        device: &Device,
        dst: &mut Buffer,
        len: usize,
        fill: impl FnOnce(&mut [u32]),
    ) -> Result<()> {
        self.copied.synchronize().map_err(driver_error("waiting for a copy"))?;
        let words = self.words.as_mut_slice().map_err(driver_error("waiting for a copy"))?;
        if len > words.len() || 4 * len > dst.bytes {
            return Err(dst.beyond(&(0..4 * len)));
        }
        let words = &mut words[..len];
        fill(words);
        if len == 0 {
            return Ok(());
        }
        device.bind()?;
        // SAFETY: both sides have `len` words; the host side is neither written nor freed before
        // the event recorded next.
        let copied =
            unsafe { result::memcpy_htod_async(dst.ptr, words, device.stream.cu_stream()) };
        copied.map_err(driver_error("copying to the device"))?;
        self.copied.record(&device.stream).map_err(driver_error("recording an event"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A device that fails copies no more either.
        let _ = self.copied.synchronize();
    }
}
