//! The state of a session as a value: taken, put back, shared, taken back.

use std::path::Path;
use std::sync::Arc;

use super::Session;
use crate::batch::Outputs;
use crate::error::{Error, Result};
use crate::schedule::Schedule;
use crate::state::{Mark, Snapshot};

/// How a rewind got to where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// Position of the checkpoint that it went on from; `None`: it began at the start.
    pub checkpoint: Option<usize>,
    /// Tokens that were run again.
    pub replayed: usize,
}

impl Session {
    /// The state as a value. The session goes on as if it was not taken.
    ///
    /// Snapshots of a session share the keys and values of the positions that they have in common:
    /// one more costs the positions since the last that is still alive, and the convolution and
    /// SSM states.
    ///
    /// # Errors
    /// [`Error::Poisoned`], or what the backend reports.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        let checkpoint = self.checkpoint()?;
        self.lineage.capture(&*self.runner, 0, &self.tokens, &self.steps, checkpoint)
    }

    /// Goes on from `snapshot`, whatever the session held. Positions that it holds already are not
    /// written again, and checkpoints that are on the way to the snapshot are kept.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] for a state of another model, [`Error::Context`] for one that does
    /// not fit: the session is as before. What the backend reports: the session must be reset or
    /// restored.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        snapshot.check(&*self.runner)?;
        let common = if self.runner.is_chunk_invariant() {
            let pairs = self.tokens.iter().zip(snapshot.tokens());
            pairs.take_while(|(a, b)| a == b).count()
        } else {
            self.lineage.common(snapshot)
        };
        self.sound = false;
        self.tokens.clear();
        self.checkpoints.retain(|checkpoint| checkpoint.position <= common);
        self.lineage.restore(&mut *self.runner, 0, snapshot)?;
        self.tokens.extend_from_slice(snapshot.tokens());
        self.steps = snapshot.steps().to_vec();
        self.set_logits(snapshot.logits().to_vec());
        self.keep(snapshot.checkpoint().clone());
        self.sound = true;
        Ok(())
    }

    /// Another session of the same model, in this state, with the same checkpoints. The two go on
    /// independently; their snapshots share what they had in common.
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot), or what the backend reports.
    pub fn fork(&mut self) -> Result<Self> {
        let snapshot = self.snapshot()?;
        let mut fork = Self::new(self.runner.sibling(self.runner.limits())?);
        fork.restore(&snapshot)?;
        fork.checkpoints = self.checkpoints.clone();
        fork.checkpoint_every = self.checkpoint_every;
        Ok(fork)
    }

    /// Writes the state to a file: [`Snapshot::save`].
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot) and [`Snapshot::save`].
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.snapshot()?.save(path)
    }

    /// Goes on from a file that [`save`](Self::save) wrote, of any backend.
    ///
    /// # Errors
    /// As [`Snapshot::load`] and [`restore`](Self::restore). The file is checked as a whole before
    /// the session is touched.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.restore(&Snapshot::load(path)?)
    }

    /// Keeps a checkpoint at the current position, from which a later rewind goes on, and returns
    /// the position. It costs the convolution and SSM states
    /// ([`mamba_state_bytes`](crate::memory::mamba_state_bytes) on the host) and is dropped by a
    /// rewind to before it, a [`reset`](Self::reset), or [`unmark`](Self::unmark).
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot).
    pub fn mark(&mut self) -> Result<usize> {
        let checkpoint = self.checkpoint()?;
        self.keep(checkpoint);
        Ok(self.position())
    }

    /// Drops the checkpoint at a position. False if there is none.
    pub fn unmark(&mut self, position: usize) -> bool {
        let before = self.checkpoints.len();
        self.checkpoints.retain(|checkpoint| checkpoint.position != position);
        self.checkpoints.len() < before
    }

    /// Keeps a checkpoint at every multiple of `tokens` from now on, so that a rewind runs fewer
    /// than `tokens` tokens again; 0 stops that, and keeps those there are. Steps end at these
    /// positions.
    pub fn checkpoint_every(&mut self, tokens: usize) {
        self.checkpoint_every = tokens;
    }

    /// Positions of the checkpoints there are, ascending.
    pub fn checkpoints(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.checkpoints.iter().map(|checkpoint| checkpoint.position)
    }

    /// Takes back the last `tokens` tokens: [`rewind_to`](Self::rewind_to).
    ///
    /// # Errors
    /// As `rewind_to`.
    pub fn rewind(&mut self, tokens: usize) -> Result<Rewound> {
        let held = self.position();
        match held.checked_sub(tokens) {
            Some(position) => self.rewind_to(position),
            None => Err(Error::Rewind { position: 0, held }),
        }
    }

    /// Takes back all tokens from `position` on; the logits are those after the tokens left.
    ///
    /// Keys and values are cut. Convolution and SSM states cannot be: they come from the nearest
    /// checkpoint at or before `position`, and the tokens from there are run again; without one,
    /// all are. State and logits are bit for bit those of a session that never went further: a
    /// backend whose results depend on the chunks of a prompt
    /// ([`is_chunk_invariant`](crate::Backend::is_chunk_invariant)) runs them in the steps in which
    /// they were run at first.
    ///
    /// # Errors
    /// [`Error::Rewind`] for a position beyond the tokens: the session is as before. As
    /// [`append`](Self::append), where tokens are run again.
    pub fn rewind_to(&mut self, position: usize) -> Result<Rewound> {
        let held = self.position();
        if position > held {
            return Err(Error::Rewind { position, held });
        }
        if position == held && self.sound {
            return Ok(Rewound { checkpoint: Some(position), replayed: 0 });
        }
        self.sound = false;
        let checkpoint = self.nearest(position)?;
        let start = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.position);
        match &checkpoint {
            Some(checkpoint) => checkpoint.write(&mut *self.runner, 0)?,
            None => self.runner.reset(0)?,
        }
        let invariant = self.runner.is_chunk_invariant();
        self.lineage.cut(if invariant { position } else { start });
        let replay = self.tokens[start..position].to_vec();
        let steps = std::mem::take(&mut self.steps);
        let kept = steps.partition_point(|step| *step <= start);
        self.steps.extend_from_slice(&steps[..kept]);
        self.tokens.truncate(start);
        self.set_logits(checkpoint.map_or_else(Vec::new, |kept| kept.logits.clone()));
        self.checkpoints.retain(|checkpoint| checkpoint.position <= position);
        self.sound = true;

        let mut done = 0;
        while done < replay.len() {
            let rest = replay.len() - done;
            let at = self.position();
            let next = steps.get(steps.partition_point(|step| *step <= at)).filter(|_| !invariant);
            let part = match next {
                Some(step) => rest.min(step - at).min(self.chunk()),
                None => self.part(rest, self.chunk()),
            };
            let wanted = part == rest || self.is_grid_point(at + part);
            let outputs = if wanted { Outputs::Last } else { Outputs::None };
            self.step(&replay[done..done + part], outputs, None)?;
            done += part;
        }
        let checkpoint = (start > 0).then_some(start);
        Ok(Rewound { checkpoint, replayed: replay.len() })
    }

    /// The last checkpoint from which the logits at `position` are to be had.
    fn nearest(&self, position: usize) -> Result<Option<Arc<Mark>>> {
        let last = position.saturating_sub(1);
        if last > 0 && Schedule::new(self.config()).mamba_layers() == 0 {
            // Only keys and values: every position is one to go on from.
            return Ok(Some(Arc::new(Mark::read(&*self.runner, 0, last, &[])?)));
        }
        let usable = |checkpoint: &&Arc<Mark>| {
            let Mark { position: at, logits, .. } = &***checkpoint;
            *at < position || (*at == position && !logits.is_empty())
        };
        Ok(self.checkpoints.iter().rev().find(usable).cloned())
    }

    /// The checkpoint at the current position, read unless it is kept.
    fn checkpoint(&self) -> Result<Arc<Mark>> {
        if !self.sound {
            return Err(Error::Poisoned);
        }
        let position = self.position();
        let is_here = |checkpoint: &&Arc<Mark>| {
            checkpoint.position == position && !checkpoint.logits.is_empty()
        };
        if let Some(kept) = self.checkpoints.last().filter(is_here) {
            return Ok(kept.clone());
        }
        self.read_logits()?;
        Ok(Arc::new(Mark::read(&*self.runner, 0, position, self.last_logits())?))
    }

    /// Puts a checkpoint in its place; there is none after the current position.
    fn keep(&mut self, checkpoint: Arc<Mark>) {
        if checkpoint.position > 0 {
            self.unmark(checkpoint.position);
            self.checkpoints.push(checkpoint);
        }
    }
}
