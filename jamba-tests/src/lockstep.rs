//! Two backends layer by layer, each layer fed the same input: a bad one is named, and errors do
//! not pile up.

pub(crate) mod models;

use std::fmt;
use std::ops::Range;

use jamba_core::recording::Recorded;
use jamba_core::schedule::{FeedForwardKind, MixerKind, Schedule};
use jamba_core::{
    Backend, Batch, Cols, Config, Limits, Model, Result, Scratch, StatePart, compose,
};
use serde::Serialize;

use crate::compare::Difference;
use crate::problem::bench::{part_name, part_shape};
use crate::tolerance::Tolerance;

/// A model that is run layer by layer, on a backend chosen at run time.
pub trait LayerRunner {
    /// The configuration of the model.
    fn config(&self) -> &Config;

    /// Name of the backend.
    fn backend_name(&self) -> &'static str;

    /// Stages a batch.
    ///
    /// # Errors
    /// Those of [`Batch::check`], or what the backend reports.
    fn stage(&mut self, batch: &Batch) -> Result<()>;

    /// Embeds the staged tokens: `(tokens, hidden_size)`.
    ///
    /// # Errors
    /// What the backend reports.
    fn embed(&mut self) -> Result<Vec<f32>>;

    /// Runs one layer on `hidden (tokens, hidden_size)`; the result has the same shape.
    ///
    /// # Errors
    /// What the backend reports.
    fn layer(&mut self, index: usize, hidden: &[f32]) -> Result<Vec<f32>>;

    /// The router's logits of the layer run last, which has experts: `(tokens, num_experts)`.
    ///
    /// # Errors
    /// What the backend reports.
    fn router_logits(&self) -> Result<Vec<f32>>;

    /// Logits of `hidden (tokens, hidden_size)`: `(outputs, vocab_size)`.
    ///
    /// # Errors
    /// What the backend reports.
    fn head(&mut self, hidden: &[f32]) -> Result<Vec<f32>>;

    /// [`Backend::read_state`].
    ///
    /// # Errors
    /// What the backend reports.
    fn read_state(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>>;

    /// [`Backend::write_state`].
    ///
    /// # Errors
    /// What the backend reports.
    fn write_state(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()>;
}

/// The [`LayerRunner`] of a [`Model`]. Layers run with the blocks of the backend, fused or not.
pub struct Layers<B: Backend> {
    model: Model<B>,
    limits: Limits,
    scratch: Scratch<B::Tensor>,
    state: B::State,
}

impl<B: Backend> Layers<B> {
    /// Allocates for batches of up to `limits`.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn new(model: Model<B>, limits: Limits) -> Result<Self> {
        let scratch = Scratch::new(model.backend(), model.config(), &limits)?;
        let state = model.backend().new_state(model.config(), &limits)?;
        Ok(Self { model, limits, scratch, state })
    }

    fn read(&self, tensor: &B::Tensor) -> Result<Vec<f32>> {
        let b = self.model.backend();
        b.read(Cols { tensor, cols: 0..b.shape(tensor)[1] })
    }
}

impl<B: Backend> LayerRunner for Layers<B> {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn backend_name(&self) -> &'static str {
        self.model.backend().name()
    }

    fn stage(&mut self, batch: &Batch) -> Result<()> {
        batch.check(self.model.config(), &self.limits)?;
        self.model.backend().stage(&mut self.state, batch)
    }

    fn embed(&mut self) -> Result<Vec<f32>> {
        let table = &self.model.weights().embed_tokens;
        self.model.backend().embed(table, &self.state, &mut self.scratch.hidden)?;
        self.read(&self.scratch.hidden)
    }

    fn layer(&mut self, index: usize, hidden: &[f32]) -> Result<Vec<f32>> {
        let Self { model, scratch, state, .. } = self;
        let b = model.backend();
        b.write(&mut scratch.hidden, hidden)?;
        let layer = &model.weights().layers[index];
        compose::layer(b, model.config(), layer, index, scratch, state)?;
        self.read(&self.scratch.hidden)
    }

    fn router_logits(&self) -> Result<Vec<f32>> {
        self.read(&self.scratch.router_logits)
    }

    fn head(&mut self, hidden: &[f32]) -> Result<Vec<f32>> {
        let Self { model, scratch, state, .. } = self;
        let b = model.backend();
        b.write(&mut scratch.hidden, hidden)?;
        compose::head(b, model.config(), model.weights(), scratch, state)?;
        self.read(&self.scratch.logits)
    }

    fn read_state(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        self.model.backend().read_state(&self.state, layer, part, slot, positions)
    }

    fn write_state(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        let b = self.model.backend();
        b.write_state(&mut self.state, layer, part, slot, positions, values)
    }
}

/// The errors of one tensor over all batches, as shares of its largest value.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Errors {
    /// `embed`, `hidden`, `router`, `conv`, `ssm`, `k`, `v` or `logits`.
    pub tensor: String,
    /// Largest of any element and batch.
    pub largest: f64,
    /// Largest root mean square of any batch, as a share of that of the values.
    pub rms: f64,
    /// Where shapes differ or a value is not finite.
    pub fault: Option<String>,
}

/// One step of a model: the embedding, a layer, the head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// `embed`, `layer 3` or `head`.
    pub name: String,
    /// What the layer is made of: `mamba + mlp`.
    pub kind: String,
    /// Output, logits of the router, states.
    pub errors: Vec<Errors>,
    /// Tokens for which the two chose other experts, whose outputs are not compared.
    pub other_experts: Option<OtherExperts>,
}

/// Tokens whose experts the two chose otherwise: for a difference of the router's logits, which
/// are compared for all tokens, that is no less than half of the margin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct OtherExperts {
    /// How many.
    pub tokens: usize,
    /// How far A's logit of its last chosen expert is above that of the next, at most: as a share
    /// of the largest logit.
    pub margin: f64,
}

/// What [`lockstep`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The backend that gave the inputs and the expected values.
    pub a: &'static str,
    /// The backend compared with it.
    pub b: &'static str,
    /// Tokens run, over all batches.
    pub tokens: usize,
    /// Embedding, layers, head.
    pub steps: Vec<Step>,
}

/// Runs `batches`, which go on from one another, on both: every layer of `b` gets the input and
/// the state that `a`'s gets.
///
/// Where a token's experts are nearly as good as others, a rounding chooses: the output of such a
/// token is as different as the experts are, and says nothing. It is left out of `hidden`, and
/// counted.
///
/// # Errors
/// What either backend reports.
pub fn lockstep(
    a: &mut dyn LayerRunner,
    b: &mut dyn LayerRunner,
    batches: &[Batch],
) -> Result<Report> {
    let config = a.config().clone();
    let kinds: Vec<_> = Schedule::new(&config).iter().collect();
    let mut steps = vec![step("embed", "embed".into(), "")];
    for (i, kind) in kinds.iter().enumerate() {
        let kind = format!("{:?} + {:?}", kind.mixer, kind.feed_forward).to_lowercase();
        steps.push(step("hidden", format!("layer {i}"), &kind));
    }
    steps.push(step("logits", "head".into(), ""));
    for batch in batches {
        a.stage(batch)?;
        b.stage(batch)?;
        let tokens = batch.tokens().len();
        let hidden_shape = [tokens, config.hidden_size];
        let mut hidden = a.embed()?;
        add(&mut steps[0], "embed", &hidden_shape, &b.embed()?, &hidden);
        for (layer, kind) in kinds.iter().enumerate() {
            let parts = match kind.mixer {
                MixerKind::Mamba => [StatePart::Conv, StatePart::Ssm],
                MixerKind::Attention => [StatePart::Keys, StatePart::Values],
            };
            for run in batch.runs() {
                for part in parts {
                    let values = a.read_state(layer, part, run.slot, 0..run.position)?;
                    b.write_state(layer, part, run.slot, 0..run.position, &values)?;
                }
            }
            let (next, got) = (a.layer(layer, &hidden)?, b.layer(layer, &hidden)?);
            let step = &mut steps[1 + layer];
            match kind.feed_forward {
                FeedForwardKind::Mlp => add(step, "hidden", &hidden_shape, &got, &next),
                FeedForwardKind::Moe => {
                    let (top_k, experts) = (config.num_experts_per_tok, config.num_experts);
                    let (scores, others) = (a.router_logits()?, b.router_logits()?);
                    let is_same = same_experts(step, [&others, &scores], top_k, experts);
                    let [got, next] = [&got, &next].map(|values| {
                        let rows = values.chunks_exact(config.hidden_size).zip(&is_same);
                        rows.filter(|(_, same)| **same).flat_map(|(row, _)| row).copied().collect()
                    });
                    let (got, next): (Vec<f32>, Vec<f32>) = (got, next);
                    add(step, "hidden", &[next.len()], &got, &next);
                    add(step, "router", &[tokens, experts], &others, &scores);
                }
            }
            for run in batch.runs() {
                for part in parts {
                    let held = run.position + run.len;
                    let expected = a.read_state(layer, part, run.slot, 0..held)?;
                    let got = b.read_state(layer, part, run.slot, 0..held)?;
                    let shape = part_shape(&config, part, held);
                    add(step, part_name(part), &shape, &got, &expected);
                }
            }
            hidden = next;
        }
        let (expected, got) = (a.head(&hidden)?, b.head(&hidden)?);
        let shape = [batch.outputs().len(), config.vocab_size];
        add(&mut steps[1 + kinds.len()], "logits", &shape, &got, &expected);
    }
    let tokens = batches.iter().map(|b| b.tokens().len()).sum();
    Ok(Report { a: a.backend_name(), b: b.backend_name(), tokens, steps })
}

fn step(output: &str, name: String, kind: &str) -> Step {
    let errors = vec![Errors { tensor: output.into(), ..Errors::default() }];
    Step { name, kind: kind.into(), errors, other_experts: None }
}

/// The `top_k` experts of largest logit, of equal ones the first, in order of their indices; and
/// the best of the rest.
fn chosen(logits: &[f32], top_k: usize) -> (Vec<usize>, Option<usize>) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let next = order.get(top_k).copied();
    order.truncate(top_k);
    order.sort_unstable();
    (order, next)
}

/// Whether each token has the same experts on both; those of the others are noted. Logits of the
/// router are of B, then of A.
fn same_experts(
    step: &mut Step,
    [got, expected]: [&[f32]; 2],
    top_k: usize,
    experts: usize,
) -> Vec<bool> {
    let largest = expected.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let tokens = got.chunks_exact(experts).zip(expected.chunks_exact(experts));
    let mut is_same = Vec::new();
    for (got, logits) in tokens {
        let [(got, _), (expected, next)] = [got, logits].map(|logits| chosen(logits, top_k));
        is_same.push(got == expected);
        if let (Some(next), false) = (next, got == expected) {
            let last = expected.iter().fold(f32::INFINITY, |last, e| last.min(logits[*e]));
            let margin = f64::from(last - logits[next]) / f64::from(largest);
            let found = step.other_experts.get_or_insert_default();
            found.tokens += 1;
            found.margin = found.margin.max(margin);
        }
    }
    is_same
}

fn add(step: &mut Step, tensor: &str, shape: &[usize], got: &[f32], expected: &[f32]) {
    let recorded = |values: &[f32]| Recorded { shape: shape.to_vec(), values: values.to_vec() };
    let mut found = Difference::new(tensor, &recorded(got), &recorded(expected));
    if got.len() != expected.len() {
        let fault = format!("{} values instead of {}", got.len(), expected.len());
        found.fault = Some(fault);
    }
    let at = step.errors.iter().position(|e| e.tensor == tensor).unwrap_or_else(|| {
        step.errors.push(Errors { tensor: tensor.into(), ..Errors::default() });
        step.errors.len() - 1
    });
    let errors = &mut step.errors[at];
    errors.largest = errors.largest.max(found.element);
    errors.rms = errors.rms.max(found.rms);
    errors.fault = errors.fault.take().or(found.fault);
}

impl Report {
    /// The tensors beyond a tolerance, with the step each belongs to.
    pub fn beyond(&self, tolerance: &Tolerance) -> Vec<(&Step, &Errors)> {
        let all = self.steps.iter().flat_map(|step| step.errors.iter().map(move |e| (step, e)));
        let within = |e: &Errors| {
            e.fault.is_none() && e.largest <= tolerance.element && e.rms <= tolerance.rms
        };
        all.filter(|(_, e)| !within(e)).collect()
    }

    /// The largest errors of all tensors: of an element, and in the root mean square. Infinite
    /// where a tensor cannot be compared.
    pub fn largest(&self) -> [f64; 2] {
        let all = || self.steps.iter().flat_map(|step| &step.errors);
        if all().any(|e| e.fault.is_some()) {
            return [f64::INFINITY; 2];
        }
        [all().map(|e| e.largest).fold(0.0, f64::max), all().map(|e| e.rms).fold(0.0, f64::max)]
    }

    /// The report as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} against {}: {} tokens, every layer from the input and state of {}",
            self.b, self.a, self.tokens, self.a
        )?;
        writeln!(f, "errors as shares of the largest value, and root mean squares (rms)\n")?;
        writeln!(f, "{:10} {:18} {:8} {:>9} {:>9}", "", "", "tensor", "largest", "rms")?;
        for step in &self.steps {
            for (i, e) in step.errors.iter().enumerate() {
                let (name, kind) = if i == 0 { (&*step.name, &*step.kind) } else { ("", "") };
                write!(f, "{name:10} {kind:18} {:8} ", e.tensor)?;
                match &e.fault {
                    Some(fault) => write!(f, "{fault}")?,
                    None => write!(f, "{:9.2e} {:9.2e}", e.largest, e.rms)?,
                }
                if let (Some(others), 0) = (step.other_experts, i) {
                    let OtherExperts { tokens, margin } = others;
                    write!(
                        f,
                        "  without {tokens} that chose other experts, by {margin:.0e} at most"
                    )?;
                }
                writeln!(f)?;
            }
        }
        let [largest, rms] = self.largest();
        writeln!(f, "{:38} {largest:9.2e} {rms:9.2e}", "largest of all")
    }
}
