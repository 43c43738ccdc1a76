//! stub
pub mod backend;
pub mod batch;
pub mod checkpoint;
pub mod compose;
pub mod config;
pub mod error;
pub mod generate;
pub mod memory;
pub mod model;
pub mod preset;
pub mod recording;
pub mod sampler;
pub mod schedule;
pub mod session;
pub mod shape;
pub mod tensor;
pub mod tokenizer;
pub mod trace;
pub mod weights;

pub use backend::{Backend, CausalConv1d, Cols, Limits, Scratch, SelectiveScan, StatePart};
pub use batch::{Batch, Outputs, Run};
pub use checkpoint::{Checkpoint, ParamSource};
pub use config::Config;
pub use error::{Error, Result};
pub use model::{LanguageModel, Model, ModelRunner, Runner};
pub use session::{Session, SessionOptions};
pub use tensor::{Dtype, HostTensor, Param, Role};
