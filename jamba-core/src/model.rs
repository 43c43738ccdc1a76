//! A model loaded into a backend, and the runner that steps it.

use std::path::Path;
use std::sync::Arc;

use crate::backend::{Backend, Limits, Scratch, StatePart};
use crate::batch::Batch;
use crate::checkpoint::{Checkpoint, ParamSource};
use crate::compose;
use crate::config::Config;
use crate::error::{Result, at_least_one};
use crate::session::{Session, SessionOptions};
use crate::trace::{Detail, Listener, Traced};
use crate::weights::{ParamSpec, Weights};

/// Configuration, weights and the backend that holds them. A clone shares all three.
pub struct Model<B: Backend> {
    inner: Arc<Inner<B>>,
}

struct Inner<B: Backend> {
    backend: B,
    config: Config,
    weights: Weights<B::Weight>,
}

impl<B: Backend> Clone for Model<B> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<B: Backend> Model<B> {
    /// Loads the Hugging Face model folder: `config.json` and safetensors.
    ///
    /// # Errors
    /// Those of [`Config::from_folder`], [`Checkpoint::open`] and [`Model::new`].
    pub fn load(folder: impl AsRef<Path>, backend: B) -> Result<Self> {
        let config = Config::from_folder(&folder)?;
        Self::new(config, &Checkpoint::open(folder)?, backend)
    }

    /// Takes parameters from any source, one at a time.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), or what the source or the backend reports.
    pub fn new(config: Config, source: &impl ParamSource, backend: B) -> Result<Self> {
        config.validate()?;
        let weights = Weights::layout(&config)
            .try_map(&mut |spec: &ParamSpec| backend.upload(source.param(spec)?))?;
        Ok(Self { inner: Arc::new(Inner { backend, config, weights }) })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.inner.backend
    }

    /// The weights, as the backend holds them.
    pub fn weights(&self) -> &Weights<B::Weight> {
        &self.inner.weights
    }
}

/// A model whose backend was chosen at run time.
pub trait LanguageModel: Send + Sync {
    /// The configuration.
    fn config(&self) -> &Config;

    /// Name of the backend.
    fn backend_name(&self) -> &'static str;

    /// Allocates scratch and state for steps of up to `limits`.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option), or what the backend reports.
    fn runner(&self, limits: Limits) -> Result<Box<dyn Runner>>;

    /// A session for one sequence.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option), or what the backend reports.
    fn session(&self, options: SessionOptions) -> Result<Session> {
        Ok(Session::new(self.runner(options.limits()?)?))
    }
}

impl<B: Backend + Send + Sync + 'static> LanguageModel for Model<B> {
    fn config(&self) -> &Config {
        &self.inner.config
    }

    fn backend_name(&self) -> &'static str {
        self.inner.backend.name()
    }

    fn runner(&self, limits: Limits) -> Result<Box<dyn Runner>> {
        Ok(Box::new(ModelRunner::new(self.clone(), limits)?))
    }
}

/// A model with scratch and state: runs batches. The rung below [`Session`].
pub trait Runner: Send {
    /// The configuration of the model.
    fn config(&self) -> &Config;

    /// What was allocated.
    fn limits(&self) -> Limits;

    /// Runs a batch: each run continues the sequence in its slot.
    ///
    /// A batch that is refused ([`Batch::check`]) changes nothing. After another error the slots
    /// of the batch hold no sequence until they are [`reset`](Self::reset).
    ///
    /// # Errors
    /// Those of [`Batch::check`], or what the backend reports.
    fn step(&mut self, batch: &Batch) -> Result<()>;

    /// [`step`](Self::step), with every activation told to `listener`.
    ///
    /// # Errors
    /// As `step`.
    fn step_traced(
        &mut self,
        batch: &Batch,
        detail: Detail,
        listener: &mut Listener<'_>,
    ) -> Result<()>;

    /// Logits of the last step: a row of `vocab_size` for every output of its batch.
    ///
    /// # Errors
    /// What the backend reports.
    fn logits(&self) -> Result<Vec<f32>>;

    /// Makes a slot ready for a new sequence.
    ///
    /// # Errors
    /// What the backend reports.
    fn reset(&mut self, slot: usize) -> Result<()>;

    /// [`Backend::read_state`].
    ///
    /// # Errors
    /// What the backend reports.
    fn read_state(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: usize,
    ) -> Result<Vec<f32>>;
}

/// The [`Runner`] of a [`Model`].
pub struct ModelRunner<B: Backend> {
    model: Model<B>,
    limits: Limits,
    scratch: Scratch<B::Tensor>,
    state: B::State,
}

impl<B: Backend> ModelRunner<B> {
    /// Allocates scratch and state for steps of up to `limits`.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for a limit of zero, or what the backend reports.
    pub fn new(model: Model<B>, limits: Limits) -> Result<Self> {
        at_least_one(&[
            ("slots", limits.slots),
            ("context", limits.context),
            ("tokens", limits.tokens),
            ("outputs", limits.outputs),
        ])?;
        let scratch = Scratch::new(model.backend(), model.config(), &limits)?;
        let state = model.backend().new_state(model.config(), &limits)?;
        Ok(Self { model, limits, scratch, state })
    }
}

impl<B: Backend + Send + Sync> Runner for ModelRunner<B> {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn step(&mut self, batch: &Batch) -> Result<()> {
        let Inner { backend, config, weights } = &*self.model.inner;
        batch.check(config, &self.limits)?;
        backend.stage(&mut self.state, batch)?;
        backend.forward(config, weights, &mut self.scratch, &mut self.state)
    }

    fn step_traced(
        &mut self,
        batch: &Batch,
        detail: Detail,
        listener: &mut Listener<'_>,
    ) -> Result<()> {
        let Inner { backend, config, weights } = &*self.model.inner;
        batch.check(config, &self.limits)?;
        backend.stage(&mut self.state, batch)?;
        let mut forward = |at, shape: [usize; 2], values: &[f32]| listener(at, shape, values);
        let traced = Traced::new(backend, detail, &mut forward);
        compose::forward(&traced, config, weights, &mut self.scratch, &mut self.state)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        let backend = self.model.backend();
        backend.read(compose::all(backend, &self.scratch.logits))
    }

    fn reset(&mut self, slot: usize) -> Result<()> {
        self.model.backend().reset_slot(&mut self.state, slot)
    }

    fn read_state(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: usize,
    ) -> Result<Vec<f32>> {
        self.model.backend().read_state(&self.state, layer, part, slot, positions)
    }
}
