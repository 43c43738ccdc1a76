//! A conversation in the terminal.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Parser;
use jamba_core::chat::{ChatSession, ChatTemplate, Message, ReplyEvent};
use jamba_core::{
    CancelToken, Error, FinishReason, GenerateOptions, Result, Sampling, SessionOptions, Tokenizer,
    WeightFormat,
};
use jamba_examples::{BackendName, model_folder, print, run};

/// Talks with a Jamba model. What was said is kept as state: a turn reads only what is new.
///
/// The demo model does not answer, as it has learnt tales and no conversations: it goes on with
/// what is said. Ctrl-C ends a reply, ctrl-D or /quit the program. /help names the commands.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Chat template, Jinja or JSON [default: that of the model, else texts one after the other].
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// What the model is told first.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of the conversation at most.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    context: usize,
    /// Tokens of a reply at most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Divides the logits: 0 always takes the most probable token [default: the model's].
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Seed of the random numbers of the first reply; the next has the next.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
}

const HELP: &str = "\
/fork             go on in a copy of this conversation
/switch N         go on in conversation N
/undo             take back the last thing you said, and its reply
/system TEXT      what the model is told first; nothing: no such message
/save FILE        write the conversation and its state to FILE and FILE.json
/load FILE        go on with one that was saved
/help             this
/quit             end (or ctrl-D); ctrl-C ends a reply
A line that begins with // is said with one / less.";

fn main() -> ExitCode {
    run(|| chat(&Args::parse()))
}

fn chat(args: &Args) -> Result<()> {
    let folder = model_folder(args.model.as_deref())?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let template = match &args.template {
        Some(path) => ChatTemplate::from_file(path, &folder)?,
        None => match ChatTemplate::from_folder(&folder)? {
            Some(template) => template,
            None => ChatTemplate::plain(&folder)?,
        },
    };
    let template = template.with_guard(&tokenizer);
    let model = args.backend.load(&folder, args.quant)?;
    let options = SessionOptions { context: args.context, ..SessionOptions::default() };
    let mut first = ChatSession::new(model.session(options)?, tokenizer, template);
    first.chat.messages.extend(args.system.as_deref().map(Message::system));

    let mut sampling = Sampling::from_folder(&folder)?;
    sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
    sampling.seed = args.seed;
    let mut talk = Talk {
        options: GenerateOptions { sampling, max_tokens: args.max_tokens, ..Default::default() },
        conversations: vec![first],
        current: 0,
        reply: on_ctrl_c()?,
        is_terminal: std::io::stdin().is_terminal(),
    };
    talk.prompt();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|source| Error::Io { path: "stdin".into(), source })?;
        // What goes wrong with one line is said, and the conversation goes on.
        match talk.take(&line) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => eprintln!("error: {error}"),
        }
        talk.prompt();
    }
    Ok(())
}

/// The reply that ctrl-C is to end.
type Running = Arc<Mutex<Option<CancelToken>>>;

fn on_ctrl_c() -> Result<Running> {
    let running = Running::default();
    let reply = running.clone();
    let handler = move || match &*reply.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(reply) => reply.cancel(),
        None => eprintln!("\n(ctrl-D or /quit ends the program)"),
    };
    let refused = |e| Error::Io { path: "ctrl-C".into(), source: std::io::Error::other(e) };
    ctrlc::set_handler(handler).map_err(refused)?;
    Ok(running)
}

struct Talk {
    options: GenerateOptions,
    conversations: Vec<ChatSession>,
    current: usize,
    reply: Running,
    is_terminal: bool,
}

impl Talk {
    fn prompt(&self) {
        if self.is_terminal {
            eprint!("{}> ", self.current + 1);
        }
    }

    fn chat(&mut self) -> &mut ChatSession {
        &mut self.conversations[self.current]
    }

    /// Does what a line asks for. False at the end.
    fn take(&mut self, line: &str) -> Result<bool> {
        let line = line.trim();
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match command {
            "" => {}
            "/quit" => return Ok(false),
            "/help" => eprintln!("{HELP}"),
            "/fork" => {
                let fork = self.chat().fork()?;
                self.conversations.push(fork);
                self.current = self.conversations.len() - 1;
                eprintln!("[conversation {}]", self.current + 1);
            }
            "/switch" => match rest.parse::<usize>() {
                Ok(n) if (1..=self.conversations.len()).contains(&n) => self.current = n - 1,
                _ => eprintln!("there are conversations 1 to {}", self.conversations.len()),
            },
            "/undo" => match self.chat().undo() {
                Some(message) => eprintln!("[taken back: {}]", message.text()),
                None => eprintln!("nothing was said"),
            },
            "/system" => {
                let messages = &mut self.chat().chat.messages;
                messages.retain(|message| message.role() != "system");
                if !rest.is_empty() {
                    messages.insert(0, Message::system(rest));
                }
            }
            "/save" | "/load" if rest.is_empty() => eprintln!("{command} needs a file"),
            "/save" => {
                self.chat().save(rest)?;
                eprintln!("[saved: {} tokens]", self.chat().session().position());
            }
            "/load" => {
                self.chat().load(rest)?;
                eprintln!("[loaded: {} tokens]", self.chat().session().position());
            }
            _ if command.starts_with('/') && !command.starts_with("//") => {
                eprintln!("there is no {command}: /help names the commands");
            }
            _ => self.say(line.strip_prefix('/').unwrap_or(line))?,
        }
        Ok(true)
    }

    fn say(&mut self, text: &str) -> Result<()> {
        let cancel = CancelToken::new();
        let options = self.options.clone();
        self.options.sampling.seed = options.sampling.seed.wrapping_add(1);
        *self.reply.lock().unwrap_or_else(PoisonError::into_inner) = Some(cancel.clone());
        self.chat().chat.messages.push(Message::user(text));
        let replied = answer(self.chat(), options, cancel);
        *self.reply.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if replied.is_err() {
            self.chat().undo();
        }
        replied
    }
}

/// Prints the reply as it comes, and what it took.
fn answer(chat: &mut ChatSession, options: GenerateOptions, cancel: CancelToken) -> Result<()> {
    let mut reply = chat.reply(options, cancel)?;
    for event in &mut reply {
        match event? {
            ReplyEvent::Text(text) => print(&text)?,
            ReplyEvent::Reasoning(text) => eprint!("{text}"),
            ReplyEvent::ToolCalls { raw, .. } => print(&raw)?,
            ReplyEvent::Malformed { raw, reason } => {
                print(&raw)?;
                eprintln!("\nwarning: a tool call that cannot be read: {reason}");
            }
            _ => {}
        }
    }
    print("\n")?;
    let (prefill, usage) = (reply.prefill(), reply.usage());
    let seconds = usage.generation_time.as_secs_f64();
    let rate = if seconds > 0.0 { usage.generated_tokens as f64 / seconds } else { 0.0 };
    let end = reply.finish_reason().unwrap_or(FinishReason::Cancelled);
    reply.finish()?;
    eprintln!(
        "[prompt: {} tokens kept, {} replayed, {} new; reply: {} at {rate:.0}/s; end: {end}]",
        prefill.reused, prefill.replayed, prefill.appended, usage.generated_tokens,
    );
    Ok(())
}
