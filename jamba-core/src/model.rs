//! A model loaded into a backend.

use std::path::Path;
use std::sync::Arc;

use crate::backend::{Backend, Limits, Need};
use crate::checkpoint::{Checkpoint, ParamSource};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Hasher};
use crate::progress::{Progress, Stage};
use crate::quant::WeightFormat;
use crate::runner::{ModelRunner, Runner};
use crate::session::{Session, SessionOptions};
use crate::spans;
use crate::weights::{ParamSpec, Weights};

/// Configuration, weights and the backend that holds them. A clone shares all three.
pub struct Model<B: Backend> {
    inner: Arc<Inner<B>>,
}

struct Inner<B: Backend> {
    backend: B,
    config: Config,
    weights: Weights<B::Weight>,
    fingerprint: Fingerprint,
}

impl<B: Backend> Clone for Model<B> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<B: Backend> Model<B> {
    /// Loads the Hugging Face model folder: `config.json` and safetensors, every tensor of which
    /// must be part of the model. ([`Model::new`] takes what it needs from a [`Checkpoint`] and
    /// leaves the rest.)
    ///
    /// The files are mapped. What a backend keeps as it is stored (`CpuBackend`: the matrices) stays in
    /// those pages, which all loads of a folder share, those of other processes too; what it converts
    /// (vectors, weights in another format) or copies to a device is each load's own.
    ///
    /// # Errors
    /// Those of [`Config::from_folder`], [`Checkpoint::open`], [`Checkpoint::check_unused`] and
    /// [`Model::new`].
    pub fn load(folder: impl AsRef<Path>, backend: B) -> Result<Self> {
        Self::load_with(folder, backend, |_| {})
    }

    /// [`load`](Self::load), with `progress` called before the first parameter and after each: with
    /// [`Stage::Weights`](crate::Stage), its quantising included.
    ///
    /// # Errors
    /// As `load`.
    pub fn load_with(
        folder: impl AsRef<Path>,
        backend: B,
        progress: impl FnMut(Progress),
    ) -> Result<Self> {
        let config = Config::from_folder(&folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let model = Self::new_with(config, &checkpoint, backend, progress)?;
        checkpoint.check_unused(&Weights::layout(model.config()))?;
        Ok(model)
    }

    /// Takes parameters from any source, one at a time.
    ///
    /// # Errors
    /// [`Error::Config`], or what the source or the backend reports: before anything is loaded
    /// where the backend knows that it has no room ([`Backend::check_memory`]).
    pub fn new(config: Config, source: &impl ParamSource, backend: B) -> Result<Self> {
        Self::new_with(config, source, backend, |_| {})
    }

    /// [`new`](Self::new), with `progress` as in [`load_with`](Self::load_with).
    ///
    /// # Errors
    /// As `new`.
    pub fn new_with(
        config: Config,
        source: &impl ParamSource,
        backend: B,
        mut progress: impl FnMut(Progress),
    ) -> Result<Self> {
        config.validate()?;
        backend.check_memory(&config, Need::Weights { mapped: source.is_mapped() })?;
        let mut hasher = Hasher::new();
        hasher.config(&config);
        let layout = Weights::layout(&config);
        let (mut done, mut total) = (0, 0);
        layout.for_each(|spec| total += source.bytes(spec));
        let _span = spans::load(&backend, config.num_hidden_layers, total);
        progress(Progress { stage: Stage::Weights, done, total });
        let weights = layout.try_map(&mut |spec: &ParamSpec| {
            let param = source.param(spec)?;
            hasher.param(&param);
            let weight = backend.upload(param)?;
            done += source.bytes(spec);
            progress(Progress { stage: Stage::Weights, done, total });
            Ok::<_, Error>(weight)
        })?;
        let fingerprint = hasher.finish();
        Ok(Self { inner: Arc::new(Inner { backend, config, weights, fingerprint }) })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.inner.backend
    }

    /// Tells this model from others.
    pub fn fingerprint(&self) -> Fingerprint {
        self.inner.fingerprint
    }

    /// The weights, as the backend holds them.
    pub fn weights(&self) -> &Weights<B::Weight> {
        &self.inner.weights
    }
}

/// A model whose backend was chosen at run time.
///
/// ```
/// use jamba_core::{LanguageModel, Model, Sampler, Sampling, SessionOptions};
/// use jamba_cpu::{CpuBackend, ReferenceBackend};
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let readable = false;
/// let model: Box<dyn LanguageModel> = match readable {
///     true => Box::new(Model::load(folder, ReferenceBackend::new())?),
///     false => Box::new(Model::load(folder, CpuBackend::new())?),
/// };
/// let mut session = model.session(SessionOptions::default())?;
/// let mut greedy = Sampler::new(Sampling::greedy(), model.config().vocab_size)?;
/// let next = session.append_sampled(&[1, 500], &mut greedy)?;
/// assert!((next.id as usize) < model.config().vocab_size);
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub trait LanguageModel: Send + Sync {
    /// The configuration.
    fn config(&self) -> &Config;

    /// Name of the backend.
    fn backend_name(&self) -> &'static str;

    /// How the weights are kept.
    fn weight_format(&self) -> WeightFormat;

    /// Tells this model from others, whatever the format of its weights.
    fn fingerprint(&self) -> Fingerprint;

    /// Allocates scratch and state for steps of up to `limits`.
    ///
    /// # Errors
    /// [`Error::Option`], or what the backend reports.
    fn runner(&self, limits: Limits) -> Result<Box<dyn Runner>>;

    /// A session for one sequence.
    ///
    /// # Errors
    /// [`Error::Option`], or what the backend reports.
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

    fn weight_format(&self) -> WeightFormat {
        self.inner.backend.weight_format()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.inner.fingerprint
    }

    fn runner(&self, limits: Limits) -> Result<Box<dyn Runner>> {
        Ok(Box::new(ModelRunner::new(self.clone(), limits)?))
    }
}
