//! Jamba: AI21's hybrid Transformer-Mamba mixture-of-experts language models (arXiv 2403.19887,
//! 2408.12570), written once over a [`Backend`] trait.
//!
//! # Use
//!
//! A [`Model`] is a Hugging Face folder loaded into a backend. A [`Session`] is one sequence of
//! tokens: it appends and returns logits, and its state is a value ([`Snapshot`]). A [`Generator`]
//! turns a prompt into pieces of text. An [`Engine`] runs many requests at the same time.
//!
//! ```
//! use jamba_core::{
//!     GenerateOptions, Generator, LanguageModel, Model, Sampling, SessionOptions, Tokenizer,
//! };
//! use jamba_cpu::CpuBackend;
//!
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
//! let model = Model::load(folder, CpuBackend::new())?;
//! let tokenizer = Tokenizer::from_folder(folder)?;
//! let mut session = model.session(SessionOptions { context: 256, ..Default::default() })?;
//!
//! let sampling = Sampling { temperature: 0.7, top_p: 0.9, seed: 42, ..Default::default() };
//! let options = GenerateOptions { sampling, max_tokens: 32, ..Default::default() };
//! let mut story = Generator::new(&mut session, &tokenizer, options)?;
//! story.prompt_text("Once upon a time")?;
//! for piece in story {
//!     print!("{}", piece?.text);
//! }
//! # Ok::<(), jamba_core::Error>(())
//! ```
//!
//! # Where things are
//!
//! Data goes one way: tokens, embedding, layers, logits, sampler, tokens.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`], [`schedule`], [`preset`], [`memory`], [`cost`] | what a model is made of and what it needs |
//! | [`checkpoint`], [`weights`], [`tensor`], [`random`] | parameters and where they come from |
//! | [`progress`], `hub` (feature `hub`) | how far a load is; folders from the Hugging Face Hub |
//! | [`quant`] | parameters in fewer bits |
//! | [`backend`], [`shape`], [`batch`], [`precision`], [`error`] | the contract with a device |
//! | [`host`] | memory and functions for backends that compute on the host |
//! | [`compose`] | the model in operators: each equation's place |
//! | [`model`], [`runner`], [`session`] | weights, scratch and state together |
//! | [`state`], [`fingerprint`] | states as values, and which model they are of |
//! | [`tokenizer`], [`sampler`], [`generate`](mod@generate), [`beam`], [`logprobs`] | text |
//! | `chat` (feature `chat`) | messages, templates, tool calls, conversations as state |
//! | `grammar` (feature `structured`) | text held to JSON schemas, regular expressions and grammars |
//! | [`engine`] | many requests on one model |
//! | [`trace`], [`recording`] | activations by name |
//!
//! With the feature `tracing`, loads, steps and requests are spans of the crate of that name:
//! `load`, `prefill`, `decode` and `request`, with counts and times, never with text.
//!
//! # Glossary
//!
//! Names are those of the checkpoints and of the papers.
//!
//! | name | meaning | shape |
//! |---|---|---|
//! | hidden | residual stream | (tokens, `hidden_size`) |
//! | x, z | the two halves of `in_proj`: the scan's input and its gate | (tokens, `d_inner`) |
//! | dt (Δ) | step of the discretisation, softplus of `dt_proj` | (tokens, `d_inner`) |
//! | A | decay of the state, `-exp(A_log)` | (`d_inner`, `d_state`) |
//! | B, C | input and output maps of the state, from x | (tokens, `d_state`) |
//! | D | direct path from x to y | (`d_inner`) |
//! | h | SSM state | (`d_inner`, `d_state`) |
//! | `d_inner` | `mamba_expand * hidden_size` | |
//! | `dt_rank` | width of dt before `dt_proj` | |
//! | router logits | score of each expert; softmax over all, then top K | (tokens, `num_experts`) |

// Errors are values. Slices are indexed, after the checks of shapes; what only a defect of this crate
// could break is asserted.
#![cfg_attr(
    not(test),
    deny(
        clippy::dbg_macro,
        clippy::expect_used,
        clippy::panic,
        clippy::print_stderr,
        clippy::print_stdout,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

// The plays of `session/tests.rs` are those of `tests/state`, which knows the crate by its name.
#[cfg(test)]
extern crate self as jamba_core;

pub mod backend;
pub mod batch;
pub mod beam;
#[cfg(feature = "chat")]
pub mod chat;
pub mod checkpoint;
pub mod compose;
pub mod config;
pub mod cost;
mod delegate;
pub mod engine;
pub mod error;
mod fields;
mod files;
pub mod fingerprint;
pub mod generate;
#[cfg(feature = "structured")]
pub mod grammar;
pub mod host;
#[cfg(feature = "hub")]
pub mod hub;
pub mod logprobs;
pub mod memory;
pub mod model;
mod pages;
pub mod precision;
pub mod preset;
pub mod progress;
pub mod quant;
pub mod random;
pub mod recording;
pub mod runner;
pub mod sampler;
pub mod schedule;
pub mod session;
pub mod shape;
mod spans;
pub mod state;
pub mod tensor;
#[cfg(test)]
mod testing;
pub mod tokenizer;
pub mod trace;
mod transfer;
pub mod weights;

pub use backend::{Backend, CausalConv1d, Cols, Limits, Need, Scratch, SelectiveScan, StatePart};
pub use batch::{Batch, Outputs, Place, Run};
pub use beam::{BeamOptions, Hypothesis, beam_search};
pub use checkpoint::{Checkpoint, ParamSource};
pub use config::Config;
pub use engine::{
    Arrival, Completion, Engine, EngineOptions, EngineStats, PrefixStats, Request, RequestUsage,
    Stream, Streams,
};
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use generate::{
    CancelToken, FinishReason, GenerateOptions, Generation, Generator, Piece, Usage, generate,
    generate_ids,
};
pub use logprobs::{Scored, TokenLogProb, perplexity, top_log_probs};
pub use model::{LanguageModel, Model};
pub use precision::Precision;
pub use progress::{Progress, Stage};
pub use quant::{Layout, Packing, Quantized, WeightFormat};
pub use runner::{ModelRunner, Runner};
pub use sampler::{Choice, Sampled, Sampler, Sampling, log_prob};
pub use session::{Rewound, Session, SessionOptions};
pub use state::Snapshot;
pub use tensor::{Dtype, HostTensor, Param, Role};
pub use tokenizer::{Decoder, Tokenizer};
