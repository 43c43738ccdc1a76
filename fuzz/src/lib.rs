//! What each fuzz target does with its bytes. Whatever they are, it ends in `Ok` or `Err`, in bounded
//! time and memory: a panic, an abort, a wait or a large allocation is a bug.
//!
//! The tests of the crates replay `corpus/` through the same functions: they include these files.

pub mod hub;
pub mod inputs;
pub mod server;
pub mod tiny;

/// libFuzzer ends the process on every panic, also where one is caught: `Tokenizer` catches those of
/// the tokenizers crate, and returns them as errors. Those that nobody catches still end it.
pub fn allow_caught_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}
