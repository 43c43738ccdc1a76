//! What holds a text to a grammar, if anything does: in a build without the feature `structured`,
//! nothing.

#[cfg(feature = "structured")]
use crate::config::Config;
use crate::error::Result;
#[cfg(feature = "structured")]
use crate::grammar::{Grammar, GrammarState};
#[cfg(feature = "structured")]
use crate::tokenizer::Tokenizer;

/// The state of the grammar of one sequence.
#[derive(Clone, Default)]
pub(crate) struct Hold {
    #[cfg(feature = "structured")]
    state: Option<GrammarState>,
}

#[cfg(feature = "structured")]
impl Hold {
    pub(crate) fn new(
        grammar: Option<&Grammar>,
        tokenizer: Option<&Tokenizer>,
        config: &Config,
    ) -> Result<Self> {
        let state = grammar.map(|grammar| grammar.start_for(tokenizer, config)).transpose()?;
        Ok(Self { state })
    }

    /// Whether anything is forbidden.
    pub(crate) fn is_there(&self) -> bool {
        self.state.is_some()
    }

    /// The tokens that may come next, as in [`GrammarState::mask`]; `None`: all.
    pub(crate) fn mask(&mut self, eos_ids: &[u32]) -> Result<Option<&[u32]>> {
        self.state.as_mut().map(|state| state.mask(eos_ids)).transpose()
    }

    /// Takes the next token; whether nothing can follow it.
    pub(crate) fn push(&mut self, id: u32, eos_ids: &[u32]) -> Result<bool> {
        let Some(state) = self.state.as_mut().filter(|_| !eos_ids.contains(&id)) else {
            return Ok(false);
        };
        state.push(id)?;
        Ok(state.is_complete())
    }
}

#[cfg(not(feature = "structured"))]
impl Hold {
    pub(crate) fn is_there(&self) -> bool {
        false
    }

    pub(crate) fn mask(&mut self, _: &[u32]) -> Result<Option<&[u32]>> {
        Ok(None)
    }

    pub(crate) fn push(&mut self, _: u32, _: &[u32]) -> Result<bool> {
        Ok(false)
    }
}
