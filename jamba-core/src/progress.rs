//! How far a load has come.

/// What is being done, and how much of it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Bytes done.
    pub done: u64,
    /// Bytes that there are to do.
    pub total: u64,
}

/// A part of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// A file comes from the hub.
    Download {
        /// Its name.
        file: String,
    },
    /// Parameters are quantised where that was asked for, and given to the backend. Bytes are those
    /// of the checkpoint.
    Weights,
}
