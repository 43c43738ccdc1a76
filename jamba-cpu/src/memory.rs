//! Large allocations, which may be refused.

use jamba_core::{Error, Result};

/// Zeros of the product of `sizes`; pages that are never written take no memory.
///
/// # Errors
/// [`Error::Memory`] if the machine does not have that much.
pub(crate) fn zeros(what: &'static str, sizes: &[usize]) -> Result<Vec<f32>> {
    let elements = sizes.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
    let bytes = elements.and_then(|n| n.checked_mul(size_of::<f32>()));
    match (elements, bytes) {
        // A larger vector than this does not exist, and asking for it would panic.
        (Some(n), Some(bytes)) if isize::try_from(bytes).is_ok() => {
            bytemuck::allocation::try_zeroed_vec(n)
                .map_err(|()| Error::Memory { what, bytes: bytes as u64 })
        }
        _ => Err(Error::Memory { what, bytes: u64::MAX }),
    }
}
