//! What may go to another thread, and what several may use at the same time.

use jamba_core::{
    CancelToken, Checkpoint, Config, Engine, Error, GenerateOptions, Generator, LanguageModel,
    Model, Request, Runner, Sampler, Session, Snapshot, Stream, Streams, Tokenizer,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};

fn sent<T: Send + ?Sized>() {}

fn shared<T: Send + Sync + ?Sized>() {}

/// That it compiles is the test.
#[test]
fn send_and_sync() {
    shared::<Model<CpuBackend>>();
    shared::<Model<ReferenceBackend>>();
    shared::<dyn LanguageModel>();
    shared::<Tokenizer>();
    shared::<Engine>();
    shared::<Checkpoint>();
    shared::<Snapshot>();
    shared::<Config>();
    shared::<GenerateOptions>();
    shared::<Request>();
    shared::<CancelToken>();
    shared::<Sampler>();
    shared::<Error>();
    sent::<Session>();
    sent::<dyn Runner>();
    sent::<Generator<'_>>();
    sent::<Stream>();
    sent::<Streams>();
    #[cfg(feature = "chat")]
    {
        use jamba_core::chat::{ChatSession, ChatTemplate, ReplyParser};
        shared::<ChatTemplate>();
        shared::<ReplyParser>();
        sent::<ChatSession>();
    }
    #[cfg(feature = "hub")]
    shared::<jamba_core::hub::Hub>();
}
