//! The thread that owns the model: takes requests into slots and steps them together.

use std::sync::{Arc, Mutex, PoisonError};

use super::prefix::PrefixCache;
use super::queue::{EngineStats, Job, Shared};
use super::sequence::{Next, Sequence, Told, apart};
use super::stream::Event;
use crate::batch::{Batch, Outputs};
use crate::error::{Error, Result};
use crate::generate::{FinishReason, Writer};
use crate::runner::Runner;
use crate::sampler::Sampled;
use crate::state::{Lineage, Mark};
use crate::tokenizer::Tokenizer;

pub(super) struct Worker {
    shared: Arc<Shared>,
    runner: Box<dyn Runner>,
    tokenizer: Option<Tokenizer>,
    cache: Option<PrefixCache>,
    budget: u64,
    slots: Vec<Slot>,
    batch: Batch,
    parts: Vec<Part>,
    /// Requests that have ended and were not told so.
    ended: Vec<(Sequence, Result<Next>)>,
    stats: EngineStats,
}

#[derive(Default)]
struct Slot {
    /// What is known of its keys and values; also without a sequence.
    lineage: Lineage,
    sequence: Option<Sequence>,
}

/// A run of the batch.
struct Part {
    slot: usize,
    /// Tokens that the slot holds after it.
    end: usize,
    rows: usize,
}

/// Ends all streams if the thread ends, also if it panics.
struct Abandon(Arc<Shared>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        runner: Box<dyn Runner>,
        tokenizer: Option<Tokenizer>,
        prefix_cache: u64,
        budget: u64,
    ) -> Self {
        let slots = (0..runner.limits().slots).map(|_| Slot::default()).collect();
        Self {
            shared,
            runner,
            tokenizer,
            cache: (prefix_cache > 0).then(|| PrefixCache::new(prefix_cache)),
            budget,
            slots,
            batch: Batch::new(),
            parts: Vec::new(),
            ended: Vec::new(),
            stats: EngineStats::default(),
        }
    }

    pub(super) fn run(mut self) {
        let _abandon = Abandon(self.shared.clone());
        while self.admit() {
            self.step();
        }
    }

    /// Takes requests into free slots; waits for one if there is none at all. False at the end.
    fn admit(&mut self) -> bool {
        self.drop_cancelled();
        let sequences = || self.slots.iter().filter_map(|slot| slot.sequence.as_ref());
        let running = sequences().count();
        let mut free = self.slots.len() - running;
        let mut bytes = sequences().map(|sequence| sequence.bytes).sum::<u64>();
        self.count();
        let budget = self.budget;
        let fits = |job: &Job| {
            let fits = free > 0 && bytes.saturating_add(job.bytes) <= budget;
            if fits {
                free -= 1;
                bytes += job.bytes;
            }
            fits
        };
        let Some(jobs) = self.shared.take(running == 0, self.stats, fits) else {
            return false;
        };
        jobs.into_iter().for_each(|job| self.start(job));
        self.tell_ended();
        true
    }

    fn drop_cancelled(&mut self) {
        for slot in 0..self.slots.len() {
            let sequence = self.slots[slot].sequence.as_ref();
            if sequence.is_some_and(|sequence| sequence.cancel.is_cancelled()) {
                self.end(slot, Ok(Next::Finished(FinishReason::Cancelled)), Told::NOTHING);
            }
        }
        self.tell_ended();
    }

    /// What runs now.
    fn count(&mut self) {
        let sequences = || self.slots.iter().filter_map(|slot| slot.sequence.as_ref());
        self.stats.running = sequences().count();
        self.stats.running_bytes = sequences().map(|sequence| sequence.bytes).sum();
        self.stats.prefix = self.cache.as_ref().map(PrefixCache::stats).unwrap_or_default();
    }

    /// Tells the requests that have ended so, once they are counted: who hears of an end finds it in
    /// the statistics.
    fn tell_ended(&mut self) {
        if self.ended.is_empty() {
            return;
        }
        self.count();
        self.shared.publish(self.stats);
        for (mut sequence, next) in self.ended.drain(..) {
            match next {
                Ok(Next::Finished(reason)) => sequence.finish(reason),
                Ok(Next::Unheard) => sequence.finish(FinishReason::Cancelled),
                Ok(Next::GoOn) => {}
                Err(error) => sequence.fail(error),
            }
        }
    }

    /// Gives a request a slot, and the longest stored state that begins its prompt.
    fn start(&mut self, job: Job) {
        let writer = apart(|| {
            let (tokenizer, config) = (self.tokenizer.as_ref(), self.runner.config());
            let mut writer = Writer::new(tokenizer, config, job.options.clone())?;
            writer.prompt(&job.prompt, job.prompt.len())?;
            Ok(writer)
        });
        let mut sequence = match writer {
            Ok(writer) => Sequence::new(job, writer),
            Err(error) => {
                self.stats.failed += 1;
                self.shared.publish(self.stats);
                job.span.fail(&error);
                job.events.send(Event::Failed(error));
                return;
            }
        };
        let found = match &mut self.cache {
            Some(cache) if !sequence.is_scored() => Some(cache.find(&sequence.prompt)),
            _ => None,
        };
        let state = found.as_ref().and_then(|found| found.state.as_ref());
        let free = self.slots.iter().enumerate().filter(|(_, slot)| slot.sequence.is_none());
        // The slot that has most of the state already.
        let common = |slot: &Slot| state.map_or(0, |state| slot.lineage.common(state));
        let Some((index, _)) = free.max_by_key(|(_, slot)| common(slot)) else { return };
        let slot = &mut self.slots[index];
        let prepared = match state {
            Some(state) => slot.lineage.restore(&mut *self.runner, index, state),
            None => {
                slot.lineage.cut(0);
                self.runner.reset(index)
            }
        };
        if let Err(error) = prepared {
            slot.sequence = Some(sequence);
            self.end(index, Err(error), Told::NOTHING);
            return;
        }
        sequence.start(state.map_or(0, |state| state.position()));
        if let Some(found) = &found {
            sequence.plan(found.known);
        } else {
            sequence.keep_at.clear();
        }
        let ready = state.filter(|_| sequence.rest() == 0).map(|state| state.logits().to_vec());
        slot.sequence = Some(sequence);
        if let Some(logits) = ready {
            let next = self.begin(index);
            self.go_on(vec![(index, next, Told::Logits(&logits))]);
        }
    }

    /// Steps every running sequence that has a part in this step.
    fn step(&mut self) {
        self.fill();
        if self.parts.is_empty() {
            return;
        }
        self.stats.steps += 1;
        let parts = std::mem::take(&mut self.parts);
        let stepped = self.runner.step(&self.batch);
        match stepped.and_then(|()| self.tell(&parts)) {
            Ok((chosen, logits)) => {
                let vocab_size = self.runner.config().vocab_size;
                let (mut rest, mut row) = (&logits[..], 0);
                let mut turns = Vec::new();
                for (part, chosen) in parts.iter().zip(chosen) {
                    let (rows, others) = rest.split_at((part.rows * vocab_size).min(rest.len()));
                    rest = others;
                    let last = &rows[rows.len().saturating_sub(vocab_size)..];
                    row += part.rows;
                    let told = match chosen {
                        Some(chosen) => Told::Chosen(chosen, row - 1),
                        None => Told::Logits(last),
                    };
                    let rows = if chosen.is_some() { &[] } else { rows };
                    turns.push((part.slot, self.take(part, rows), told));
                }
                self.go_on(turns);
            }
            Err(error) => {
                let source = Arc::new(error);
                for part in &parts {
                    let error = Error::Step { source: source.clone() };
                    self.end(part.slot, Err(error), Told::NOTHING);
                }
            }
        }
        self.parts = parts;
        self.tell_ended();
    }

    /// What the step computed: for each part the next token, where the backend chose it, and the
    /// logits of all outputs, where any part needs its own.
    fn tell(&self, parts: &[Part]) -> Result<(Vec<Option<Sampled>>, Vec<f32>)> {
        let mut choices = Vec::new();
        for part in parts.iter().filter(|part| part.rows > 0) {
            let sequence = self.slots[part.slot].sequence.as_ref();
            choices.resize(choices.len() + part.rows - 1, None);
            choices.push(sequence.and_then(|sequence| sequence.choice_at(part.end)));
        }
        let mut rows = self.runner.choose(&choices)?.into_iter();
        let last = |part: &Part| rows.by_ref().take(part.rows).last().flatten();
        let chosen: Vec<_> = parts.iter().map(last).collect();
        let is_needed = |(part, chosen): (&Part, &Option<_>)| part.rows > 0 && chosen.is_none();
        let is_needed = parts.iter().zip(&chosen).any(is_needed);
        Ok((chosen, if is_needed { self.runner.logits()? } else { Vec::new() }))
    }

    /// Makes the batch: a token of every generation, then parts of the prompts, in equal shares of
    /// the tokens that are left.
    fn fill(&mut self) {
        let limits = self.runner.limits();
        self.batch.clear();
        self.parts.clear();
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(Sequence { pending: Some(id), position, .. }) = &slot.sequence else {
                continue;
            };
            self.batch.push(index, *position, &[*id], Outputs::Last);
            self.parts.push(Part { slot: index, end: position + 1, rows: 1 });
        }
        let is_reading = |slot: &Slot| slot.sequence.as_ref().is_some_and(|s| s.pending.is_none());
        let mut reading = self.slots.iter().filter(|slot| is_reading(slot)).count();
        let mut tokens = limits.tokens - self.parts.len();
        // One row is left for each sequence that is not scored, and for each that is one at least.
        let is_scored = |slot: &&Slot| {
            slot.sequence.as_ref().is_some_and(|s| s.pending.is_none() && s.is_scored())
        };
        let mut scored = self.slots.iter().filter(is_scored).count();
        let mut rows = limits.outputs - limits.slots;
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(sequence) = slot.sequence.as_ref().filter(|_| is_reading(slot)) else {
                continue;
            };
            let mut share = tokens.div_ceil(reading);
            reading -= 1;
            if sequence.is_scored() {
                share = share.min(rows.div_ceil(scored));
                scored -= 1;
            }
            let end = sequence.part_end(share);
            let part = sequence.position..end;
            if part.is_empty() {
                continue;
            }
            tokens -= part.len();
            let (outputs, count) = if sequence.is_scored() {
                rows -= part.len();
                (Outputs::All, part.len())
            } else if end == sequence.prompt.len() || sequence.keep_at.contains(&end) {
                (Outputs::Last, 1)
            } else {
                (Outputs::None, 0)
            };
            self.batch.push(index, sequence.position, &sequence.prompt[part], outputs);
            self.parts.push(Part { slot: index, end, rows: count });
        }
    }

    /// Takes what a step computed for one sequence: `rows` are logits of the tokens of a part, as far
    /// as they are wanted. True if its next token is to be chosen.
    fn take(&mut self, part: &Part, rows: &[f32]) -> Result<bool> {
        let vocab_size = self.runner.config().vocab_size;
        let Some(sequence) = &mut self.slots[part.slot].sequence else { return Ok(false) };
        if sequence.pending.is_some() {
            sequence.position = part.end;
            return Ok(true);
        }
        if !rows.iter().all(|v| v.is_finite()) {
            return Err(Error::NonFinite { position: part.end });
        }
        self.stats.prompt_tokens += (part.end - sequence.position) as u64;
        apart(|| {
            sequence.read_part(part.end, vocab_size, rows);
            Ok(())
        })?;
        let is_read = sequence.rest() == 0;
        if !rows.is_empty() && sequence.keep_at.contains(&part.end) {
            let last = &rows[rows.len() - vocab_size..];
            self.keep(part.slot, last)?;
        }
        if is_read { self.begin(part.slot) } else { Ok(false) }
    }

    /// Keeps the state of a slot for later prompts.
    fn keep(&mut self, slot: usize, logits: &[f32]) -> Result<()> {
        let Slot { lineage, sequence } = &mut self.slots[slot];
        let (Some(cache), Some(sequence)) = (&mut self.cache, sequence) else { return Ok(()) };
        let end = sequence.position;
        let checkpoint = Mark::read(&*self.runner, slot, end, logits)?;
        let (tokens, checkpoint) = (sequence.held(), Arc::new(checkpoint));
        cache.insert(lineage.capture(&*self.runner, slot, &tokens, &[], checkpoint)?);
        sequence.keep(end);
        Ok(())
    }

    /// Keeps the state of a slot whose last token was `told` of: with the logits there, so that it
    /// serves a prompt that is no longer, too.
    fn keep_reply(&mut self, slot: usize, told: Told<'_>) -> Result<()> {
        match told {
            Told::Logits(logits) => self.keep(slot, logits),
            Told::Chosen(_, row) => {
                let vocab_size = self.runner.config().vocab_size;
                let logits = self.runner.logits()?;
                let row = logits.chunks_exact(vocab_size).nth(row).unwrap_or_default();
                self.keep(slot, row)
            }
        }
    }

    /// The prompt of a sequence is in its slot. True if a token is to be chosen.
    fn begin(&mut self, slot: usize) -> Result<bool> {
        let Some(sequence) = &mut self.slots[slot].sequence else { return Ok(false) };
        match sequence.end_prompt() {
            Next::Finished(reason) => {
                self.end(slot, Ok(Next::Finished(reason)), Told::NOTHING);
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Chooses the next token of every sequence that is to have one, on the threads of the backend.
    /// `turns` has a slot once, whether its sequence is to have one, and what was told of it.
    fn go_on(&mut self, turns: Vec<(usize, Result<bool>, Told<'_>)>) {
        /// A sequence and what becomes of it.
        struct Turn<'a, 'b> {
            slot: usize,
            sequence: &'a mut Sequence,
            told: Told<'b>,
            next: Result<Next>,
        }
        let context = self.runner.limits().context;
        let mut told: Vec<_> = self.slots.iter().map(|_| None).collect();
        for (slot, taken, last) in turns {
            match taken {
                Ok(true) => told[slot] = Some(last),
                Ok(false) => {}
                Err(error) => self.end(slot, Err(error), Told::NOTHING),
            }
        }
        let mut turns = Vec::new();
        for (slot, (Slot { sequence, .. }, told)) in self.slots.iter_mut().zip(told).enumerate() {
            if let (Some(sequence), Some(told)) = (sequence, told) {
                turns.push(Mutex::new(Turn { slot, sequence, told, next: Ok(Next::GoOn) }));
            }
        }
        // Each is locked by the one task that has its number.
        self.runner.for_each(turns.len(), &|index| {
            let mut turn = turns[index].lock().unwrap_or_else(PoisonError::into_inner);
            let is_full = turn.sequence.position >= context;
            let told = turn.told;
            turn.next = apart(|| turn.sequence.write(told, is_full));
        });
        let ends = turns.into_iter().map(|turn| {
            let turn: Turn = turn.into_inner().unwrap_or_else(PoisonError::into_inner);
            (turn.slot, turn.next, turn.told)
        });
        let ends: Vec<_> = ends.collect();
        let generated = ends.iter().filter(|(_, next, _)| next.is_ok()).count();
        self.stats.generated_tokens += generated as u64;
        ends.into_iter().for_each(|(slot, next, told)| self.end(slot, next, told));
    }

    /// Frees the slot of a sequence that does not go on. `told` is what was told of its last token.
    fn end(&mut self, slot: usize, next: Result<Next>, told: Told<'_>) {
        let mut is_whole = true;
        match &next {
            Ok(Next::GoOn) => return,
            Ok(Next::Finished(FinishReason::Cancelled) | Next::Unheard) => {
                self.stats.cancelled += 1;
            }
            Ok(Next::Finished(_)) => {
                self.stats.finished += 1;
                let sequence = self.slots[slot].sequence.as_ref();
                if sequence.is_some_and(Sequence::is_worth_keeping) {
                    // The reply is there, whether its state can be kept or not.
                    is_whole = self.keep_reply(slot, told).is_ok();
                }
            }
            Err(_) => {
                self.stats.failed += 1;
                is_whole = false;
            }
        }
        let slot = &mut self.slots[slot];
        if !is_whole {
            slot.lineage.cut(0);
        }
        if let Some(sequence) = slot.sequence.take() {
            self.ended.push((sequence, next));
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::task::Poll;

    use super::*;
    use crate::backend::Limits;
    use crate::engine::queue::tests::job;
    use crate::testing::Script;

    /// A prompt whose first token panics.
    pub(in crate::engine) const PANICS: [u32; 3] = [9, 9, 9];

    #[test]
    fn a_request_whose_work_panics_fails_alone() {
        let shared = Arc::new(Shared::new(3));
        let heard = [&[5, 6][..], &PANICS, &[7]].map(|prompt| {
            let (mut job, receiver) = job(0);
            job.prompt = prompt.to_vec();
            shared.push(job).unwrap();
            receiver
        });
        shared.close();
        let limits = Limits { slots: 1, context: 16, tokens: 4, outputs: 2 };
        Worker::new(shared.clone(), Box::new(Script::new(limits)), None, 0, u64::MAX).run();
        for (number, receiver) in heard.into_iter().enumerate() {
            let mut events = Vec::new();
            while let Poll::Ready(Some(event)) = receiver.try_receive() {
                events.push(event);
            }
            match events.pop() {
                Some(Event::Failed(Error::Panic { reason })) if number == 1 => {
                    assert!(events.is_empty() && reason.contains("part of the test"), "{reason}");
                }
                Some(Event::Finished(..)) if number != 1 => assert!(events.len() > 1),
                _ => panic!("request {number} ended otherwise"),
            }
        }
        let stats = shared.stats();
        assert_eq!((stats.finished, stats.failed, stats.running), (2, 1, 0));
    }
}
