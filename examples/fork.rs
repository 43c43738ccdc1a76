//! One state, several continuations; then back, and on with other words.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use jamba_core::{
    Error, GenerateOptions, Generator, Result, Sampling, Session, SessionOptions, Snapshot,
    Tokenizer, WeightFormat,
};
use jamba_examples::{BackendName, model_folder, note, print, run};

/// Reads a prompt once and continues it several times from the same state, then rewinds into the
/// prompt, puts other words in the place of its end, and continues that.
///
/// Texts go to stdout; what it cost goes to stderr.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text to continue.
    #[arg(long, value_name = "TEXT", default_value = "Once upon a time there was a fox who")]
    prompt: String,
    /// Continuations.
    #[arg(long, value_name = "N", default_value_t = 3)]
    forks: u64,
    /// Tokens of the prompt that are taken back.
    #[arg(long, value_name = "N", default_value_t = 2)]
    rewind: usize,
    /// What follows in their place.
    #[arg(long, value_name = "TEXT", default_value = " bear that")]
    edit: String,
    /// Tokens to generate at most, each time.
    #[arg(long, value_name = "N", default_value_t = 40)]
    max_tokens: usize,
    /// Divides the logits.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Seed of the first continuation; the next has the next.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Keep a checkpoint every N tokens, so that rewinding replays fewer (0: none).
    #[arg(long, value_name = "N", default_value_t = 4)]
    checkpoint_every: usize,
    /// Keep the state of the prompt in this file, or go on from it if it is there.
    #[arg(long, value_name = "FILE.safetensors")]
    state: Option<PathBuf>,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
}

fn main() -> ExitCode {
    run(|| fork(&Args::parse()))
}

fn fork(args: &Args) -> Result<()> {
    let folder = model_folder(args.model.as_deref())?;
    let model = args.backend.load(&folder, args.quant)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let ids = tokenizer.encode(&args.prompt)?;
    let edit = tokenizer.encode_plain(&args.edit)?;
    let saved =
        args.state.as_ref().filter(|path| path.is_file()).map(Snapshot::load).transpose()?;
    let held = saved.as_ref().map_or(ids.len(), Snapshot::position);
    if args.rewind >= held {
        return Err(Error::Option {
            option: "rewind",
            value: args.rewind.to_string(),
            allowed: "a token of the prompt must be left",
        });
    }
    let context = (held + edit.len()).saturating_add(args.max_tokens);
    let mut session = model.session(SessionOptions { context, ..SessionOptions::default() })?;
    session.checkpoint_every(args.checkpoint_every);

    let start = Instant::now();
    match &saved {
        Some(saved) => {
            note!("[the prompt is the one of the state]");
            session.restore(saved)?;
        }
        None => drop(session.append(&ids)?),
    }
    note!("[{} tokens of prompt: {:.1?}]", session.position(), start.elapsed());
    if let Some(path) = &args.state {
        session.save(path)?;
    }

    let snapshot = session.snapshot()?;
    note!("[the state: {} bytes]", snapshot.bytes());
    let prompt = tokenizer.decode(session.tokens())?;
    for number in 0..args.forks {
        let start = Instant::now();
        let mut fork = session.fork()?;
        note!("[a fork: {:.1?}]", start.elapsed());
        let text = go_on(args, &mut fork, &tokenizer, args.seed.wrapping_add(number))?;
        print(&format!("{prompt}{text}\n"))?;
    }

    let start = Instant::now();
    let rewound = session.rewind(args.rewind)?;
    let from = match rewound.checkpoint {
        Some(position) => format!("the checkpoint at {position}"),
        None => "the start".into(),
    };
    note!(
        "[{} tokens taken back: {} replayed from {from}, {:.1?}]",
        args.rewind,
        rewound.replayed,
        start.elapsed()
    );
    if !edit.is_empty() {
        session.append(&edit)?;
    }
    let prompt = tokenizer.decode(session.tokens())?;
    let text = go_on(args, &mut session, &tokenizer, args.seed)?;
    print(&format!("{prompt}{text}\n"))
}

/// Generates from where the session is.
fn go_on(args: &Args, session: &mut Session, tokenizer: &Tokenizer, seed: u64) -> Result<String> {
    let sampling = Sampling { temperature: args.temperature, seed, ..Sampling::default() };
    let options =
        GenerateOptions { sampling, max_tokens: args.max_tokens, ..GenerateOptions::default() };
    let mut generator = Generator::new(session, tokenizer, options)?;
    generator.resume()?;
    generator.map(|piece| Ok(piece?.text)).collect()
}
