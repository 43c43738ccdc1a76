//! What the examples have in common: choosing a model and a backend, failing with a message.

use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
#[cfg(feature = "hub")]
use jamba_core::hub::Hub;
use jamba_core::weights::Weights;
use jamba_core::{
    Checkpoint, Config, Error, LanguageModel, Model, ParamSource, Precision, Result, WeightFormat,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};

pub mod machine;
pub mod measure;
pub mod progress;
pub mod quality;

use progress::bar;

/// The backends that an example can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// Multi-threaded, vectorised; products of bf16 or int8 where the weights are so.
    Cpu,
    /// The same with products of f32.
    CpuF32,
    /// One obvious loop per equation, in f64: slow, and what others are held to.
    Reference,
    /// The first NVIDIA GPU, bf16 weights and products (built with `--features cuda`).
    Cuda,
    /// The first NVIDIA GPU, everything in f32 (built with `--features cuda`).
    CudaF32,
}

impl BackendName {
    /// Loads a model folder and keeps its weights in this format.
    ///
    /// # Errors
    /// Those of [`Model::load`]; [`Error::Unsupported`] for a format that the backend lacks.
    pub fn load(self, folder: &Path, format: WeightFormat) -> Result<Box<dyn LanguageModel>> {
        let config = Config::from_folder(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let model = self.model(config, &checkpoint, format)?;
        checkpoint.check_unused(&Weights::layout(model.config()))?;
        Ok(model)
    }

    /// A model of this shape, its parameters from any source, kept in this format.
    ///
    /// # Errors
    /// Those of [`Model::new`]; [`Error::Unsupported`] for a format that the backend lacks.
    pub fn model(
        self,
        config: Config,
        source: &impl ParamSource,
        format: WeightFormat,
    ) -> Result<Box<dyn LanguageModel>> {
        let precision = match self {
            Self::Cpu | Self::Cuda => Precision::Bf16,
            _ => Precision::F32,
        };
        Ok(match self {
            Self::Cpu | Self::CpuF32 => {
                Box::new(Model::new_with(config, source, cpu(precision, format), bar())?)
            }
            Self::Reference => {
                let backend = ReferenceBackend::new().with_format(format);
                Box::new(Model::new_with(config, source, backend, bar())?)
            }
            #[cfg(feature = "cuda")]
            Self::Cuda | Self::CudaF32 => {
                Box::new(Model::new_with(config, source, cuda(precision, format)?, bar())?)
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda | Self::CudaF32 => return Err(without_cuda()),
        })
    }
}

impl std::fmt::Display for BackendName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::CpuF32 => "cpu-f32",
            Self::Reference => "reference",
            Self::Cuda => "cuda",
            Self::CudaF32 => "cuda-f32",
        })
    }
}

/// The cores of this machine.
pub fn cpu(precision: Precision, format: WeightFormat) -> CpuBackend {
    CpuBackend::new().with_precision(precision).with_format(format)
}

/// The first GPU.
///
/// # Errors
/// What is missing, or what the card says.
#[cfg(feature = "cuda")]
pub fn cuda(precision: Precision, format: WeightFormat) -> Result<jamba_cuda::CudaBackend> {
    let options = jamba_cuda::CudaOptions { precision, format, ..Default::default() };
    Ok(jamba_cuda::CudaBackend::with_options(options)?)
}

/// What to say where a GPU is asked for and was not built in.
#[cfg(not(feature = "cuda"))]
pub fn without_cuda() -> Error {
    let what = "GPUs in this build: add `--features cuda` to the cargo command".into();
    Error::Unsupported { backend: "cuda", what }
}

/// The folder that `--model` names, the [demo model](demo_model) without it. With the feature `hub`,
/// what is no folder and looks like `ORG/NAME` or `ORG/NAME@REVISION` is a model of the Hugging Face
/// Hub, which is downloaded where the cache does not have it.
///
/// # Errors
/// [`Error::Hub`].
pub fn model_folder(model: Option<&Path>) -> Result<PathBuf> {
    let Some(model) = model else { return Ok(demo_model()) };
    #[cfg(feature = "hub")]
    if !model.exists()
        && let Some(name) = model.to_str()
    {
        let (id, revision) = name.split_once('@').map_or((name, None), |(id, r)| (id, Some(r)));
        if Hub::is_id(id) {
            return Hub::from_env()?.folder(id, revision, bar());
        }
    }
    Ok(model.to_owned())
}

/// The demo model: in `models/` of the working directory, else where this was built from.
pub fn demo_model() -> PathBuf {
    let name = Path::new("models/jamba-tales-11m");
    if name.is_dir() {
        return name.to_owned();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.unwrap_or(Path::new(".")).join(name)
}

/// Runs an example: an error is printed to stderr, with exit code 2 where the input is to blame
/// and 1 where it is not.
pub fn run(main: impl FnOnce() -> Result<()>) -> ExitCode {
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note!("error: {error}");
            let innocent = matches!(
                error,
                Error::Device { .. }
                    | Error::Poisoned
                    | Error::EngineStopped
                    | Error::Step { .. }
                    | Error::Panic { .. }
            );
            ExitCode::from(if innocent { 1 } else { 2 })
        }
    }
}

/// Tells the user something on stderr, as `eprintln` does; but a program whose stderr is full or
/// closed goes on.
#[macro_export]
macro_rules! note {
    ($($text:tt)*) => { $crate::tell(format_args!($($text)*)) };
}

/// What [`note`] calls.
pub fn tell(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints results, at once. Ends the program quietly if nobody reads them any more.
///
/// # Errors
/// [`Error::Io`] if they cannot be written.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(source) => Err(Error::Io { path: "stdout".into(), source }),
    }
}

/// The text in a file, or in the standard input if that is `-`.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, has more than 1 GiB, or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    const MOST: u64 = 1 << 30;
    let unreadable = |source| Error::Io { path: path.to_owned(), source };
    let from: Box<dyn Read> = match path.as_os_str() == "-" {
        true => Box::new(std::io::stdin()),
        false => Box::new(std::fs::File::open(path).map_err(unreadable)?),
    };
    let mut text = String::new();
    let read = from.take(MOST + 1).read_to_string(&mut text).map_err(unreadable)?;
    if read as u64 > MOST {
        return Err(unreadable(std::io::Error::other("it has more than 1 GiB")));
    }
    Ok(text)
}

/// A file for what is only known at the end: opened at the beginning, so that a path that cannot be
/// written is refused before the work, and until then left as it is.
pub struct Output {
    path: PathBuf,
    file: std::fs::File,
}

impl Output {
    /// # Errors
    /// [`Error::Io`] where the file can be neither opened nor made.
    pub fn open(path: &Path) -> Result<Self> {
        let file = std::fs::File::options().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Puts the text in the place of what the file had.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(mut self, text: &str) -> Result<()> {
        // What is no file, /dev/stdout for one, has no length.
        let is_file = self.file.metadata().is_ok_and(|of| of.is_file());
        let emptied = if is_file { self.file.set_len(0) } else { Ok(()) };
        let written = emptied.and_then(|()| self.file.write_all(text.as_bytes()));
        written.map_err(|source| Error::Io { path: self.path, source })
    }
}

/// Parses a list of token ids: `1,2,3`, an empty list from the empty string.
///
/// # Errors
/// Names the item that is no token id.
pub fn parse_ids(text: &str) -> std::result::Result<Vec<u32>, String> {
    let items = text.split([',', ' ']).map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| item.parse().map_err(|_| format!("`{item}` is not a token id"))).collect()
}

/// The program in the README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
