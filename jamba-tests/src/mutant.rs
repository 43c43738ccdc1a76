//! A backend with one bug planted in it: what shows that the kit bites.

mod ops;

use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;

use jamba_core::{Backend, Batch};

/// A bug that is easily made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// The convolution begins every step from zeros.
    ConvContextDropped,
    /// The scan begins every step from zeros.
    ScanRestarted,
    /// B is not normed.
    BLayernormSkipped,
    /// `in_proj` gives z, x.
    XzSwapped,
    /// The weights of the chosen experts add up to one.
    TopKRenormalised,
    /// Tokens for expert 0 go to expert 1 and the other way round.
    ExpertIdsSwapped,
    /// `softplus(dt) + dt_bias`.
    DtBiasOutside,
    /// Keys and values are written one position too early, over the last of the past.
    KvOffByOne,
    /// A reset leaves the convolution and SSM states as they are.
    StaleSlot,
    /// The last of every thousand products of a matrix is 1 % too large.
    OneInAThousand,
    /// The SSM state is kept in bf16.
    Bf16State,
    /// Activations are kept in bf16: a bug of a backend that claims f32, right for one that
    /// claims bf16.
    Bf16Activations,
    /// A sequence goes on from the SSM state of the sequence before it in the batch.
    SlotsShared,
    /// The logits of the first token are given in place of the last.
    WrongOutputRow,
    /// The last column of a product is not written.
    ColumnUnwritten,
    /// The convolution keeps a ring of inputs, and a state that is written leaves its beginning
    /// where the sequence before had it.
    RingNotTurned,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::ConvContextDropped,
        Self::ScanRestarted,
        Self::BLayernormSkipped,
        Self::XzSwapped,
        Self::TopKRenormalised,
        Self::ExpertIdsSwapped,
        Self::DtBiasOutside,
        Self::KvOffByOne,
        Self::StaleSlot,
        Self::OneInAThousand,
        Self::Bf16State,
        Self::Bf16Activations,
        Self::SlotsShared,
        Self::WrongOutputRow,
        Self::ColumnUnwritten,
        Self::RingNotTurned,
    ];
}

/// A backend with a bug, or with none: then it only passes on.
#[derive(Debug)]
pub struct Mutant<B> {
    inner: B,
    bug: Option<Bug>,
    /// First column of B in `[dt | B | C]`, once a state tells the model.
    dt_rank: AtomicUsize,
}

impl<B: Backend> Mutant<B> {
    /// Plants a bug.
    pub fn new(inner: B, bug: Option<Bug>) -> Self {
        Self { inner, bug, dt_rank: AtomicUsize::new(usize::MAX) }
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }
}

/// A state with the staged batch.
pub struct MutantState<S> {
    inner: S,
    batch: Batch,
    /// Inputs that the convolution keeps of a channel.
    kept: usize,
    /// Slots that ran tokens since they were reset.
    used: HashSet<usize>,
}
