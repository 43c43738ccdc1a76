//! Operands that do not fit: every one must be refused, without a panic, with results and states as
//! they were.

mod operators;

use std::panic::{AssertUnwindSafe, catch_unwind};

use jamba_core::recording::Recording;
use jamba_core::{Backend, Batch, Config, Error, HostTensor, Limits, Outputs, Param, Result, Role};

use crate::compare::bit_equal;
use crate::problem::bench;
use crate::problem::block::Sizes;

pub(crate) use operators::run;

/// What is tried: the methods that move memory, all state functions together, every operator.
pub const NAMES: [&str; 15] = [
    "upload",
    "write",
    "read",
    "state",
    "embed",
    "linear",
    "rms_norm",
    "rms_norm_cols",
    "add_assign",
    "silu_mul",
    "causal_conv1d",
    "selective_scan",
    "attention",
    "moe_experts",
    "output_rows",
];

/// Tokens staged: two of one sequence, one of another.
const TOKENS: usize = 3;
const LIMITS: Limits = Limits { slots: 2, context: 8, tokens: 4, outputs: 4 };
/// The Mamba layer and the attention layer of the model whose states there are.
const MAMBA: usize = 0;
const ATTENTION: usize = 1;

/// What an operand that does not fit must be answered with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// [`Error::Shape`].
    Shape,
    /// Any error: it is not about shapes alone.
    Refusal,
}

/// A backend on which operators are tried, with a state of a small model.
struct Bench<'a, B: Backend> {
    b: &'a B,
    config: Config,
    state: B::State,
    tried: usize,
    wrong: Vec<String>,
}

/// How many were tried, and what is wrong of those that were not as they must be.
pub(crate) struct Found {
    pub(crate) tried: usize,
    pub(crate) wrong: Vec<String>,
}

impl<'a, B: Backend> Bench<'a, B> {
    fn new(b: &'a B) -> Result<Self> {
        let sizes = Sizes {
            hidden: 6,
            expand: 2,
            d_state: 3,
            d_conv: 4,
            heads: 4,
            kv_heads: 2,
            head_dim: 3,
            attn: [2, ATTENTION],
            ..Sizes::small()
        };
        let config = sizes.config();
        let mut state = b.new_state(&config, &LIMITS)?;
        for (layer, part) in bench::parts(&config) {
            for slot in 0..LIMITS.slots {
                let n = bench::part_shape(&config, part, LIMITS.context).iter().product();
                b.write_state(&mut state, layer, part, slot, 0..LIMITS.context, &values(n))?;
            }
        }
        let mut batch = Batch::new();
        batch.push(1, 0, &[0, 4], Outputs::All);
        batch.push(0, 3, &[2], Outputs::All);
        b.stage(&mut state, &batch)?;
        Ok(Self { b, config, state, tried: 0, wrong: Vec::new() })
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<B::Tensor> {
        let mut tensor = self.b.alloc(rows, cols)?;
        self.b.write(&mut tensor, &values(rows * cols))?;
        Ok(tensor)
    }

    /// A result: room for the tokens, something in one row.
    fn out(&self, cols: usize) -> Result<B::Tensor> {
        let mut out = self.b.alloc(TOKENS, cols)?;
        self.b.write(&mut out, &values(cols))?;
        Ok(out)
    }

    fn weight(&self, role: Role, shape: &[usize]) -> Result<B::Weight> {
        let tensor = HostTensor::from_f32(shape.to_vec(), values(shape.iter().product()));
        self.b.upload(Param::new("weight", role, tensor))
    }

    /// All that could be changed: the result and the states.
    fn seen(&self, out: &B::Tensor) -> Result<Recording> {
        let mut seen = bench::only(bench::read(self.b, out)?);
        let slots = (0..LIMITS.slots).map(|slot| (slot, LIMITS.context));
        bench::read_states(self.b, &self.config, &self.state, slots, &mut seen)?;
        Ok(seen)
    }

    /// Operands that fit are accepted: nothing passes by refusing everything.
    fn fits(
        &mut self,
        mut out: B::Tensor,
        f: impl FnOnce(&B, &mut B::Tensor, &mut B::State) -> Result<()>,
    ) -> Result<()> {
        f(self.b, &mut out, &mut self.state)
    }

    fn refused(
        &mut self,
        what: &str,
        answer: Answer,
        mut out: B::Tensor,
        f: impl FnOnce(&B, &mut B::Tensor, &mut B::State) -> Result<()>,
    ) -> Result<()> {
        self.tried += 1;
        let before = self.seen(&out)?;
        let run = AssertUnwindSafe(|| f(self.b, &mut out, &mut self.state));
        let wrong = match catch_unwind(run) {
            Err(_) => Some("it panics".to_owned()),
            Ok(Ok(())) => Some("it is accepted".to_owned()),
            Ok(Err(Error::Shape { .. })) => None,
            Ok(Err(_)) if answer == Answer::Refusal => None,
            Ok(Err(error)) => Some(format!("Error::Shape is due, not: {error}")),
        };
        let changed = !bit_equal(&self.seen(&out)?, &before);
        let changed = changed.then(|| "it changes the result or a state".to_owned());
        self.wrong.extend([wrong, changed].into_iter().flatten().map(|w| format!("{what}: {w}")));
        Ok(())
    }

    /// A function without a result that could be changed.
    fn refuses<T>(
        &mut self,
        what: &str,
        answer: Answer,
        f: impl FnOnce(&B, &mut B::State) -> Result<T>,
    ) -> Result<()> {
        let out = self.out(1)?;
        self.refused(what, answer, out, |b, _, state| f(b, state).map(drop))
    }

    fn found(self) -> Found {
        Found { tried: self.tried, wrong: self.wrong }
    }
}

/// Some values, none of them special.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| 0.25 + (i % 7) as f32 * 0.125).collect()
}
