//! Memory that is read from one end to the other: weights.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

use crate::error::{Error, Result};

/// Values that start as zeros, on pages of their own: large ones, where the system has them
/// (`MADV_HUGEPAGE` of Linux), which are read faster one after the other.
///
/// A page that is not written to takes no memory; a large one is 2 MiB.
pub struct Pages<T> {
    map: MmapMut,
    values: PhantomData<T>,
}

impl<T: bytemuck::Pod> Pages<T> {
    /// So many zeros.
    ///
    /// # Errors
    /// [`Error::Memory`], which says that they are for `what`, if the machine does not have as much.
    pub fn zeros(what: &'static str, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|n| isize::try_from(*n).is_ok());
        let map = bytes.and_then(|bytes| MmapMut::map_anon(bytes).ok()).ok_or(Error::Memory {
            what,
            bytes: bytes.map_or(u64::MAX, |n| n as u64),
            available: None,
        })?;
        // Advice: where it is not taken, pages are small.
        #[cfg(all(target_os = "linux", not(miri)))]
        drop(map.advise(memmap2::Advice::HugePage));
        Ok(Self { map, values: PhantomData })
    }
}

impl<T: bytemuck::Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map)
    }
}

impl<T: bytemuck::Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_zeros_that_can_be_changed() {
        for len in [0, 1, 1023, 100_000] {
            let mut pages = Pages::<u16>::zeros("a test", len).unwrap();
            assert_eq!(*pages, vec![0; len]);
            assert!(pages.as_ptr().addr().is_multiple_of(64), "a line of the cache");
            pages.fill(7);
            assert_eq!(*pages, vec![7; len]);
        }
    }

    #[test]
    #[cfg(all(target_pointer_width = "64", not(miri)))]
    fn what_no_machine_has_is_refused() {
        for (len, asked) in [(usize::MAX, u64::MAX), (1 << 62, u64::MAX), (1 << 59, 4 << 59)] {
            match Pages::<f32>::zeros("a test", len) {
                Err(Error::Memory { what: "a test", bytes, .. }) => assert_eq!(bytes, asked),
                _ => panic!("{len} values"),
            }
        }
    }

    #[test]
    #[cfg(all(target_os = "linux", not(miri)))]
    fn they_are_large_where_the_system_has_such() {
        let pages = Pages::<u8>::zeros("a test", 8 << 20).unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut within = false;
        let of_these = maps.lines().filter(|line| {
            if let Some((start, end)) = line.split(' ').next().and_then(|r| r.split_once('-'))
                && let (Ok(start), Ok(end)) =
                    (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                within = (start..end).contains(&pages.as_ptr().addr());
            }
            within
        });
        let flags = of_these.filter(|line| line.starts_with("VmFlags")).collect::<String>();
        let has_such = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        assert!(!has_such || flags.split(' ').any(|flag| flag == "hg"), "{flags}");
    }
}
