//! What can go wrong, with the facts that say what to do about it.

use std::any::Any;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::backend::StatePart;
use crate::tensor::Role;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that jamba-core and its backends report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", escaped(path.display()))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model folder lacks something that every model folder has.
    #[error(
        "{} has no {wanted}: {}",
        escaped(folder.display()),
        found.map_or("a Hugging Face model folder is expected".into(), |f| {
            format!("it has {f}, which must be converted first")
        })
    )]
    Missing {
        /// The folder searched.
        folder: PathBuf,
        /// The file or files, any of which would do.
        wanted: &'static str,
        /// A file of another format that would do if it were converted.
        found: Option<&'static str>,
    },
    /// A model could not be had from the Hugging Face Hub.
    #[error("model {} of the Hugging Face Hub: {}", escaped(id), escaped(reason))]
    Hub {
        /// Its name there.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// A file is not the JSON it should be.
    #[error("{} is not valid JSON: {source}", escaped(path.display()))]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A field of `config.json`, or of another JSON file of a model, has a value that cannot be run.
    #[error("`{field}` of {file} is {}, but {allowed}", escaped(value))]
    Config {
        /// Name of the file.
        file: &'static str,
        /// Name of the field, as in the file.
        field: &'static str,
        /// Its value, `missing` if it is not there.
        value: String,
        /// What would be accepted.
        allowed: String,
    },
    /// No preset of this name.
    #[error("there is no preset `{name}`: the presets are {known}")]
    UnknownPreset {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A weights file does not follow the safetensors format.
    #[error("{} is not a valid safetensors file: {}", escaped(path.display()), escaped(reason))]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `model.safetensors.index.json` does not fit the files beside it.
    #[error("{}: {}", escaped(path.display()), escaped(reason))]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration needs a tensor that the checkpoint lacks.
    #[error("tensor `{}` is not in the checkpoint {}", escaped(name), escaped(path.display()))]
    MissingTensor {
        /// Its name in the checkpoint.
        name: String,
        /// File or folder of the checkpoint.
        path: PathBuf,
    },
    /// The checkpoint has tensors that the configuration does not.
    #[error(
        "{count} tensors of {} are not part of the model that config.json describes, \
         `{}` among them: the two do not belong together",
        escaped(path.display()),
        escaped(name)
    )]
    UnusedTensors {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// How many.
        count: usize,
        /// One of them.
        name: String,
    },
    /// A tensor of the checkpoint has another shape than the configuration says.
    #[error(
        "tensor `{}` in {} has shape {got:?}, the configuration requires {expected:?}",
        escaped(name),
        escaped(path.display())
    )]
    TensorShape {
        /// Its name in the checkpoint.
        name: String,
        /// The file that holds it.
        path: PathBuf,
        /// Required by the configuration.
        expected: Vec<usize>,
        /// Found.
        got: Vec<usize>,
    },
    /// A tensor of the checkpoint has a dtype that is not supported.
    #[error(
        "tensor `{}` in {} is {got}: F32, F16 and BF16 are supported",
        escaped(name),
        escaped(path.display())
    )]
    TensorDtype {
        /// Its name in the checkpoint.
        name: String,
        /// The file that holds it.
        path: PathBuf,
        /// Found.
        got: String,
    },
    /// A weight cannot be quantised.
    #[error(
        "tensor `{}` cannot be quantised: its weight in row {row}, column {column} is {value}, \
         and only finite ones below 2^126 have a scale (`stored` keeps weights as they are)",
        escaped(name)
    )]
    WeightRange {
        /// The parameter's name in the checkpoint's terms.
        name: String,
        /// Row, all dimensions but the last together.
        row: usize,
        /// Column.
        column: usize,
        /// The weight.
        value: f32,
    },
    /// The tokenizer could not be read or refused its input.
    #[error("tokenizer {}: {}", escaped(path.display()), escaped(reason))]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// A chat template cannot be parsed, or refuses what it is given.
    #[error("{}:{line}: {}", escaped(path.display()), escaped(reason))]
    Template {
        /// The file that it is in, and its name there if it has one.
        path: PathBuf,
        /// Line of the template, from 1; 0 where that is not known.
        line: usize,
        /// What is wrong with it, or what it says about the messages.
        reason: String,
    },
    /// A grammar cannot be compiled, or no token of the model follows it.
    #[error("grammar: {}", escaped(reason))]
    Grammar {
        /// What is wrong with it.
        reason: String,
    },
    /// A message of a chat is not what it should be.
    #[error("{}", escaped(reason))]
    Message {
        /// What is wrong with it.
        reason: String,
    },
    /// An operand does not have the shape its operator requires.
    #[error("{op}: {what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Operator.
        op: &'static str,
        /// Operand.
        what: &'static str,
        /// Required (rows, columns).
        expected: [usize; 2],
        /// Given (rows, columns).
        got: [usize; 2],
    },
    /// A parameter was given where one of another kind is needed.
    #[error("{op}: {what} is a parameter of role {got:?}, {expected} is needed")]
    Role {
        /// Operator.
        op: &'static str,
        /// Operand.
        what: &'static str,
        /// What is needed.
        expected: &'static str,
        /// What the parameter given is for.
        got: Role,
    },
    /// A token id is beyond the vocabulary.
    #[error("token id {id} (number {index} of the input) is beyond the vocabulary of {vocab_size}")]
    Token {
        /// The id.
        id: u32,
        /// Its place in the input.
        index: usize,
        /// Ids run from 0 to this, exclusive.
        vocab_size: usize,
    },
    /// There is nothing to start from.
    #[error("the prompt is empty, and no beginning-of-text token can stand in for it")]
    EmptyPrompt,
    /// A prompt was given to a generator that has generated a token or ended.
    #[error("the prompt comes too late: this generator has generated a token or ended")]
    LatePrompt,
    /// A text was given to a generator that knows only ids.
    #[error("this generator was made without a tokenizer: give it token ids")]
    NoTokenizer,
    /// More tokens than the session was made for.
    #[error(
        "{needed} tokens of context are needed, {allocated} were allocated: \
         ask for a larger context when the session is made"
    )]
    Context {
        /// Tokens after this step.
        needed: usize,
        /// Tokens that fit.
        allocated: usize,
    },
    /// A layer was taken for one of another kind, or is not there.
    #[error("layer {layer} of the model has no {what}")]
    Layer {
        /// The layer.
        layer: usize,
        /// What was asked of it.
        what: String,
    },
    /// A batch does not fit the session it was given to.
    #[error("batch: {what} is {got}, {allowed}")]
    Batch {
        /// The quantity.
        what: &'static str,
        /// Given.
        got: usize,
        /// What would be accepted.
        allowed: String,
    },
    /// The model computed a NaN or an infinity.
    #[error(
        "the logits after {position} tokens are not finite: \
         the weights hold NaN or overflow (nothing was sampled)"
    )]
    NonFinite {
        /// Tokens of context when it was seen.
        position: usize,
    },
    /// The machine does not have as much memory.
    #[error(
        "{bytes} bytes for {what} cannot be allocated{}: ask for a smaller context or batch, or for \
         weights of fewer bits",
        available.map_or(String::new(), |bytes| format!(", {bytes} are available"))
    )]
    Memory {
        /// What they are for.
        what: &'static str,
        /// How many; `u64::MAX` if they are more.
        bytes: u64,
        /// How many there are, where that was asked before.
        available: Option<u64>,
    },
    /// An option has a value that makes no sense.
    #[error("option `{option}` is {value}, but {allowed}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What would be accepted.
        allowed: &'static str,
    },
    /// An earlier step failed, so the state is no longer that of any token sequence.
    #[error("an earlier step of this session failed: reset, rewind or restore it before going on")]
    Poisoned,
    /// A session was to go back to where it has not been.
    #[error("cannot rewind to position {position}: the session holds {held} tokens")]
    Rewind {
        /// Asked for.
        position: usize,
        /// Tokens that the session holds.
        held: usize,
    },
    /// A part of the state was asked for that a layer does not have.
    #[error("there is no {part:?} state in layer {layer}: {reason}")]
    NoState {
        /// The layer.
        layer: usize,
        /// What was asked for.
        part: StatePart,
        /// What there is.
        reason: String,
    },
    /// A file is not a saved state, or not a whole one.
    #[error("{} is not a usable state: {}", escaped(path.display()), escaped(reason))]
    StateFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A state belongs to another model.
    #[error(
        "the state is of another model: its {} is {}, this model's is {model}",
        escaped(what),
        escaped(state)
    )]
    StateMismatch {
        /// What differs.
        what: String,
        /// In the state.
        state: String,
        /// In the model.
        model: String,
    },
    /// A request came while as many as allowed were waiting.
    #[error("the engine's queue is full: {limit} requests wait already")]
    QueueFull {
        /// Requests that may wait.
        limit: usize,
    },
    /// More memory for states than a budget allows.
    #[error("{needed} bytes of state are needed, the budget is {budget}")]
    Budget {
        /// For what was asked.
        needed: u64,
        /// The most that may be used.
        budget: u64,
    },
    /// The engine was shut down, or its thread has ended.
    #[error("the engine has stopped")]
    EngineStopped,
    /// The step failed that several requests had part in.
    #[error("the step that this request was part of failed: {source}")]
    Step {
        /// What the backend reported.
        source: std::sync::Arc<Error>,
    },
    /// What was done for one request of an engine panicked: a defect, which the others do not feel.
    #[error("a defect: what was done for this request panicked ({reason})")]
    Panic {
        /// What the panic said.
        reason: String,
    },
    /// The backend does not do this.
    #[error("the {backend} backend does not support {what}")]
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// What was asked of it.
        what: String,
    },
    /// The device refused.
    #[error("{backend}: {source}")]
    Device {
        /// Name of the backend.
        backend: &'static str,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What a panic said.
pub(crate) fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".into())
}

/// Text as a message shows it that came from a file: what would move the cursor, colour a terminal
/// or turn the line around is spelled out, and the end of a long text is left out.
pub fn escaped(text: impl Display) -> String {
    const LONGEST: usize = 1000;
    let text = text.to_string();
    let mut out = String::with_capacity(text.len().min(LONGEST));
    for (count, c) in text.chars().enumerate() {
        if count == LONGEST {
            out.push_str("...");
            break;
        }
        let turns = matches!(c, '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// Refuses the first of these options that is zero.
pub(crate) fn at_least_one(options: &[(&'static str, usize)]) -> Result<()> {
    match options.iter().find(|(_, value)| *value == 0) {
        None => Ok(()),
        Some(&(option, value)) => {
            let allowed = "it must be at least 1";
            Err(Error::Option { option, value: value.to_string(), allowed })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_does_not_reach_the_terminal() {
        let name = "a\u{1b}[31mred\u{9b}2J\r\n\u{202e}tseb\u{7f}é狐";
        let shown = "a\\u{1b}[31mred\\u{9b}2J\\r\\n\\u{202e}tseb\\u{7f}é狐";
        assert_eq!(escaped(name), shown);
        assert_eq!(escaped("x".repeat(2000)).len(), 1003);
        let (path, name) = (PathBuf::from("\u{1b}c"), name.to_owned());
        let reason = name.clone();
        let errors = [
            Error::UnusedTensors { path: path.clone(), count: 1, name: name.clone() },
            Error::Index { path: path.clone(), reason: reason.clone() },
            Error::Safetensors { path: path.clone(), reason: reason.clone() },
            Error::StateFile { path: path.clone(), reason: reason.clone() },
            Error::Tokenizer { path, reason: reason.clone() },
            Error::StateMismatch { what: name, state: reason, model: "1".into() },
        ];
        for error in errors {
            let message = error.to_string();
            assert!(message.contains(shown) && !message.contains(char::is_control), "{message}");
        }
    }
}
