//! Ending a generation from elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Cancels a generation from another thread, or from the one that runs it. Clones are one token.
///
/// ```
/// use std::time::Duration;
///
/// use jamba_core::CancelToken;
///
/// let cancel = CancelToken::new(); // a clone of it goes to `Generator::with_cancel`
/// let timer = cancel.clone();
/// std::thread::spawn(move || {
///     std::thread::sleep(Duration::from_millis(1));
///     timer.cancel();
/// });
/// while !cancel.is_cancelled() {
///     std::thread::yield_now();
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the end: no step begins after it is seen.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
