//! The locks of the engine: those of the standard library, or, to try every interleaving of its
//! threads, those of loom (`RUSTFLAGS="--cfg loom" cargo test -p jamba-core --lib loom`).

#[cfg(all(test, loom))]
pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(all(test, loom)))]
pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
