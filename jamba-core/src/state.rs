//! The state of a sequence as a value: taken from a slot, put into another, kept in a file.
//!
//! A [`Snapshot`] lives on the host, in f32, which holds 16-bit caches exactly. Keys and values
//! are kept in segments of positions that never change, so that snapshots of one lineage share
//! what they have in common: the next snapshot of a sequence costs its new positions, and the
//! convolution and SSM states, which do not grow.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Weak};

use crate::backend::StatePart;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, essentials};
use crate::runner::Runner;
use crate::transfer;

mod file;

#[cfg(feature = "chat")]
pub(crate) use file::Replacement;

/// The state of a sequence: its tokens, the keys and values of each, the convolution and SSM
/// states after the last, and the logits there. A clone shares all of it.
///
/// ```
/// use jamba_core::{LanguageModel, Model, SessionOptions, Snapshot};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let options = SessionOptions { context: 64, ..Default::default() };
/// let mut session = model.session(options)?;
/// session.append(&[1, 500, 600])?;
/// let file = std::env::temp_dir().join(format!("{}.state", std::process::id()));
/// session.snapshot()?.save(&file)?;
///
/// // In another process, on another backend, in as many sessions as there shall be.
/// let snapshot = Snapshot::load(&file)?;
/// let mut later = model.session(options)?;
/// later.restore(&snapshot)?;
/// assert_eq!(later.append(&[700])?, session.append(&[700])?);
/// # std::fs::remove_file(file).ok();
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Snapshot(Arc<Value>);

struct Value {
    origin: Origin,
    tokens: Vec<u32>,
    /// Positions at which steps ended, ascending; none where that is not known.
    steps: Vec<usize>,
    /// Together the positions of `tokens`; none where no layer has keys.
    spans: Vec<Span>,
    checkpoint: Arc<Mark>,
}

/// The model that a state is of.
#[derive(Clone, PartialEq)]
struct Origin {
    fingerprint: Fingerprint,
    /// [`essentials`] of its configuration, and the format of its weights.
    config: Vec<(String, String)>,
}

impl Origin {
    fn of(runner: &dyn Runner) -> Self {
        let mut config = essentials(runner.config());
        config.push(("weight_format", runner.weight_format().to_string()));
        let config = config.into_iter().map(|(name, v)| (name.into(), v)).collect();
        Self { fingerprint: runner.fingerprint(), config }
    }

    /// Names what differs in the model that the state is to go on with.
    fn check(&self, model: &Self) -> Result<()> {
        let of = |origin: &Self, name: &str| {
            let found = origin.config.iter().find(|(key, _)| key == name);
            found.map_or("missing".into(), |(_, value)| value.clone())
        };
        let names = model.config.iter().map(|(name, _)| name);
        for name in names {
            let (state, model) = (of(self, name), of(model, name));
            if state != model {
                return Err(Error::StateMismatch { what: name.clone(), state, model });
            }
        }
        if self.fingerprint != model.fingerprint {
            return Err(Error::StateMismatch {
                what: "weights' fingerprint".into(),
                state: self.fingerprint.to_string(),
                model: model.fingerprint.to_string(),
            });
        }
        Ok(())
    }
}

/// What does not grow with a sequence: convolution and SSM states after `position` tokens, and
/// the logits there.
pub(crate) struct Mark {
    pub(crate) position: usize,
    /// In the order of [`transfer::parts`].
    states: Vec<(usize, StatePart, Vec<f32>)>,
    /// Empty where they were not computed.
    pub(crate) logits: Vec<f32>,
}

impl Mark {
    pub(crate) fn read(
        runner: &dyn Runner,
        slot: usize,
        position: usize,
        logits: &[f32],
    ) -> Result<Self> {
        let mut states = Vec::new();
        for (layer, part) in transfer::parts(runner.config()) {
            if matches!(part, StatePart::Conv | StatePart::Ssm) {
                states.push((layer, part, runner.read_state(layer, part, slot, 0..position)?));
            }
        }
        Ok(Self { position, states, logits: logits.to_vec() })
    }

    pub(crate) fn write(&self, runner: &mut dyn Runner, slot: usize) -> Result<()> {
        for (layer, part, values) in &self.states {
            runner.write_state(*layer, *part, slot, 0..self.position, values)?;
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let states = self.states.iter().map(|(_, _, values)| values.len()).sum::<usize>();
        4 * (states + self.logits.len()) as u64
    }
}

/// Keys and values of consecutive positions of all attention layers.
struct Segment {
    positions: usize,
    kv_heads: usize,
    /// In the order of [`transfer::parts`]; `(kv_heads, positions, head_dim)` each.
    parts: Vec<(usize, StatePart, Vec<f32>)>,
}

impl Segment {
    fn bytes(&self) -> u64 {
        4 * self.parts.iter().map(|(_, _, values)| values.len() as u64).sum::<u64>()
    }
}

/// The first positions of a segment.
#[derive(Clone)]
struct Span {
    segment: Arc<Segment>,
    positions: usize,
}

impl Span {
    /// Some positions of a part, counted from the beginning of the segment.
    fn cut(&self, part: usize, range: Range<usize>) -> Cow<'_, [f32]> {
        let Segment { positions, kv_heads, parts } = &*self.segment;
        let values = &parts[part].2;
        if range == (0..*positions) {
            return values.into();
        }
        transfer::cut(values, *kv_heads, *positions, range).into()
    }
}

impl Snapshot {
    /// The tokens of the sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.0.tokens
    }

    /// How many tokens there are.
    pub fn position(&self) -> usize {
        self.0.tokens.len()
    }

    /// The logits after the last token, `vocab_size` values; none if they were not computed.
    pub fn logits(&self) -> &[f32] {
        &self.0.checkpoint.logits
    }

    /// Tells the model that the state is of from others.
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.origin.fingerprint
    }

    /// Bytes that it keeps alive, those that it shares with other snapshots included.
    pub fn bytes(&self) -> u64 {
        self.own_bytes() + self.segments().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// Bytes that no other snapshot has part in.
    pub(crate) fn own_bytes(&self) -> u64 {
        let Value { tokens, steps, checkpoint, .. } = &*self.0;
        let lists = size_of_val(&tokens[..]) + size_of_val(&steps[..]);
        checkpoint.bytes() + lists as u64
    }

    /// Identity and bytes of what other snapshots may have part in.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let of = |span: &Span| (Arc::as_ptr(&span.segment) as usize, span.segment.bytes());
        self.0.spans.iter().map(of)
    }

    pub(crate) fn steps(&self) -> &[usize] {
        &self.0.steps
    }

    pub(crate) fn checkpoint(&self) -> &Arc<Mark> {
        &self.0.checkpoint
    }

    /// Whether the model of `runner` can go on from it in a slot of its size.
    pub(crate) fn check(&self, runner: &dyn Runner) -> Result<()> {
        self.0.origin.check(&Origin::of(runner))?;
        let (needed, allocated) = (self.position(), runner.limits().context);
        if needed > allocated {
            return Err(Error::Context { needed, allocated });
        }
        Ok(())
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Snapshot({} tokens of {})", self.position(), self.fingerprint())
    }
}

/// Which segments hold the same keys and values as a slot does, from its first position on. It
/// does not keep them alive.
#[derive(Clone, Default)]
pub(crate) struct Lineage(Vec<(Weak<Segment>, usize)>);

impl Lineage {
    fn alive(&self) -> Vec<Span> {
        let upgrade = |(segment, positions): &(Weak<Segment>, usize)| {
            Some(Span { segment: segment.upgrade()?, positions: *positions })
        };
        self.0.iter().map_while(upgrade).collect()
    }

    fn set(&mut self, spans: &[Span]) {
        let weak = |span: &Span| (Arc::downgrade(&span.segment), span.positions);
        self.0 = spans.iter().map(weak).collect();
    }

    /// The slot goes on differently from this position.
    pub(crate) fn cut(&mut self, position: usize) {
        let mut rest = position;
        for (_, positions) in &mut self.0 {
            *positions = rest.min(*positions);
            rest -= *positions;
        }
        self.0.retain(|(_, positions)| *positions > 0);
    }

    /// Positions from the first on that the slot and a snapshot have in common.
    pub(crate) fn common(&self, snapshot: &Snapshot) -> usize {
        let mut common = 0;
        for (span, (segment, positions)) in snapshot.0.spans.iter().zip(&self.0) {
            if !std::ptr::eq(Arc::as_ptr(&span.segment), segment.as_ptr()) {
                break;
            }
            let both = span.positions.min(*positions);
            common += both;
            if both < span.positions.max(*positions) {
                break;
            }
        }
        common
    }

    /// Takes the state of a slot that holds `tokens`. Reads the positions that are not in a living
    /// segment, and the convolution and SSM states unless `checkpoint` has them.
    pub(crate) fn capture(
        &mut self,
        runner: &dyn Runner,
        slot: usize,
        tokens: &[u32],
        steps: &[usize],
        checkpoint: Arc<Mark>,
    ) -> Result<Snapshot> {
        let mut spans = self.alive();
        let start = spans.iter().map(|span| span.positions).sum();
        let new = start..tokens.len();
        let mut parts = Vec::new();
        for (layer, part) in transfer::parts(runner.config()) {
            if matches!(part, StatePart::Keys | StatePart::Values) && !new.is_empty() {
                let values = runner.read_state(layer, part, slot, new.clone())?;
                parts.push((layer, part, values));
            }
        }
        if !parts.is_empty() {
            let kv_heads = runner.config().num_key_value_heads;
            let segment = Arc::new(Segment { positions: new.len(), kv_heads, parts });
            spans.push(Span { positions: new.len(), segment });
        }
        self.set(&spans);
        let origin = Origin::of(runner);
        let (tokens, steps) = (tokens.to_vec(), steps.to_vec());
        Ok(Snapshot(Arc::new(Value { origin, tokens, steps, spans, checkpoint })))
    }

    /// Puts a state, which was [checked](Snapshot::check), into a slot. Positions that the slot
    /// holds already are not written. After an error the slot holds no sequence.
    pub(crate) fn restore(
        &mut self,
        runner: &mut dyn Runner,
        slot: usize,
        snapshot: &Snapshot,
    ) -> Result<()> {
        let common = self.common(snapshot);
        self.0.clear();
        let mut start = 0;
        for span in &snapshot.0.spans {
            let skip = common.saturating_sub(start).min(span.positions);
            let (from, to) = (start + skip, start + span.positions);
            start = to;
            if from == to {
                continue;
            }
            for (index, (layer, part, _)) in span.segment.parts.iter().enumerate() {
                let values = span.cut(index, skip..span.positions);
                runner.write_state(*layer, *part, slot, from..to, &values)?;
            }
        }
        snapshot.0.checkpoint.write(runner, slot)?;
        self.set(&snapshot.0.spans);
        Ok(())
    }
}
