//! Serves a Jamba model over HTTP, with OpenAI's API and a page to chat in.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use jamba_core::chat::ChatTemplate;
use jamba_core::{Engine, EngineOptions, Error, Result, Sampling, Tokenizer, WeightFormat};
use jamba_examples::{BackendName, model_folder, run};
use jamba_serve::{Server, Settings};

/// Serves a Jamba model: OpenAI's API under /v1, a page to chat in under /, /health and /metrics.
///
/// It listens on this machine only unless --host says otherwise. On SIGINT (ctrl-C) or SIGTERM it
/// takes no more requests, and ends when those that run have ended or --grace is over.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// What requests call the model [default: the folder's name].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Chat template, Jinja or JSON [default: that of the model, else texts one after the other].
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Address to listen on; 0.0.0.0 is every one this machine has.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 is a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Key that requests must have (Authorization: Bearer KEY). The variable keeps it out of the
    /// list of processes.
    #[arg(long, value_name = "KEY", env = "JAMBA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Replies that are generated at the same time; a request may ask for several.
    #[arg(long, value_name = "N", default_value_t = 8)]
    slots: usize,
    /// Tokens of a request at most, prompt and reply.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    context: usize,
    /// Tokens of a reply at most, also where a request asks for more.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    max_tokens: usize,
    /// Replies that may wait; requests for more are told to come back later.
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue: usize,
    /// Bytes of a request's body at most.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    body: usize,
    /// MiB that the states of running requests may take together: others wait for their turn, and
    /// what could never run is refused [default: as much as all slots take].
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// MiB of states kept to begin later prompts from.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    prefix_cache: u64,
    /// Seconds that running requests have to end after a signal.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    grace: u64,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
}

fn main() -> ExitCode {
    run(|| serve(&Args::parse()))
}

fn serve(args: &Args) -> Result<()> {
    let folder = model_folder(args.model.as_deref())?;
    let name = args.name.clone().or_else(|| Some(folder.file_name()?.to_str()?.to_owned()));
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let template = match &args.template {
        Some(path) => ChatTemplate::from_file(path, &folder)?,
        None => match ChatTemplate::from_folder(&folder)? {
            Some(template) => template,
            None => ChatTemplate::plain(&folder)?,
        },
    };
    let sampling = Sampling::from_folder(&folder)?;
    let model = args.backend.load(&folder, args.quant)?;
    let options = EngineOptions {
        slots: args.slots,
        context: args.context,
        queue: args.queue,
        prefix_cache: args.prefix_cache.saturating_mul(1 << 20),
        memory: args.memory.map(|mib| mib.saturating_mul(1 << 20)),
        ..EngineOptions::default()
    };
    let engine = Engine::new(&*model, &tokenizer, options)?;
    let settings = Settings {
        name: name.unwrap_or_else(|| "jamba".into()),
        api_key: args.api_key.clone(),
        context: args.context,
        max_tokens: args.max_tokens,
        body: args.body,
        grace: Duration::from_secs(args.grace),
    };
    let server = Server::new(engine, tokenizer, template, sampling, settings);

    let address = SocketAddr::new(args.host, args.port);
    let failed = |source| Error::Io { path: format!("{address}").into(), source };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let end = signal();
        eprintln!("[{} on {}: http://{local}]", folder.display(), model.backend_name());
        if !local.ip().is_loopback() && server.is_open() {
            eprintln!("warning: whoever reaches {local} can use the model: there is no --api-key");
        }
        server.run(listener, end).await.map_err(failed)
    })
}

/// Waits for the first signal that asks for the end; the second ends the program at once. Signals are
/// heard from the call on.
fn signal() -> impl Future<Output = ()> + Send + 'static {
    let first = asked();
    async {
        first.await;
        eprintln!("[ending: once more ends at once]");
        tokio::spawn(async {
            asked().await;
            std::process::exit(130);
        });
    }
}

#[cfg(unix)]
fn asked() -> impl Future<Output = ()> + Send + 'static {
    use tokio::signal::unix::{SignalKind, signal};
    let heard = [SignalKind::interrupt(), SignalKind::terminate()].map(|kind| {
        let signal = signal(kind);
        async {
            match signal {
                Ok(mut signal) => drop(signal.recv().await),
                Err(_) => std::future::pending().await,
            }
        }
    });
    let [interrupt, terminate] = heard;
    async {
        tokio::select! {
            () = interrupt => {}
            () = terminate => {}
        }
    }
}

#[cfg(not(unix))]
async fn asked() {
    let _ = tokio::signal::ctrl_c().await;
}
