//! `config.json` to [`Config`], validated once.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::files::{missing, read_json};
use crate::tensor::Dtype;

/// The knobs of one Jamba model (arXiv 2403.19887, section 2), named as in `config.json`.
///
/// A `Config` read by [`Config::from_folder`] or [`Config::from_json`], or taken from
/// [`Config::preset`], is valid. Fields may be changed; whoever takes a `Config` calls
/// [`Config::validate`] again.
///
/// ```
/// use jamba_core::Config;
///
/// let config = Config::from_json(r#"{"model_type": "jamba", "num_hidden_layers": 8}"#)?;
/// assert_eq!(config.d_inner(), 2 * config.hidden_size);
/// let error = Config::from_json(r#"{"num_attention_heads": 7}"#).unwrap_err();
/// assert!(error.to_string().contains("num_attention_heads"));
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of one MLP or expert.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of one head: `hidden_size / num_attention_heads` unless the file says otherwise.
    pub head_dim: usize,
    /// Layer `i` mixes by attention where `i % attn_layer_period == attn_layer_offset`.
    pub attn_layer_period: usize,
    /// See [`attn_layer_period`](Self::attn_layer_period).
    pub attn_layer_offset: usize,
    /// Layer `i` has experts where `i % expert_layer_period == expert_layer_offset`.
    pub expert_layer_period: usize,
    /// See [`expert_layer_period`](Self::expert_layer_period).
    pub expert_layer_offset: usize,
    /// Experts in an MoE layer; with fewer than two, every layer has a dense MLP.
    pub num_experts: usize,
    /// Experts used per token (K of the paper).
    pub num_experts_per_tok: usize,
    /// SSM state per channel.
    pub mamba_d_state: usize,
    /// Taps of the causal convolution.
    pub mamba_d_conv: usize,
    /// `d_inner / hidden_size`.
    pub mamba_expand: usize,
    /// Rank of dt.
    pub mamba_dt_rank: usize,
    /// Whether the convolution has a bias.
    pub mamba_conv_bias: bool,
    /// Whether `in_proj` and `out_proj` have biases.
    pub mamba_proj_bias: bool,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Token that every text begins with.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Context that the model was trained for.
    pub max_position_embeddings: Option<usize>,
    /// Dtype that the checkpoint was written in.
    pub dtype: Option<Dtype>,
}

const FILE: &str = "config.json";
const GENERATION: &str = "generation_config.json";

// No model that fits any machine is larger. Within these limits the bytes of all parameters, as
// f32, fit `u64`, and the table of their names fits memory.
pub(crate) const MAX_VOCAB: usize = 1 << 24;
const MAX_SIZE: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
/// Experts of a layer times layers.
const MAX_EXPERTS: usize = 1 << 18;

impl Config {
    /// Reads `config.json`, and `generation_config.json` if there is one, from a model folder.
    ///
    /// As in transformers, an `eos_token_id` of `generation_config.json` replaces that of
    /// `config.json`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`], [`Error::Json`], or [`Error::Config`] naming the field.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let value = read_json(&path)?.ok_or_else(|| missing(folder, "config.json"))?;
        let mut config = Self::from_value(&value)?;
        if let Some(generation) = read_json(&folder.join(GENERATION))? {
            let field = Fields::new(&generation, GENERATION)?;
            if let Some(ids) = field.ids("eos_token_id")? {
                config.eos_token_ids = ids;
                config.check_eos(GENERATION)?;
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`.
    ///
    /// What is absent has the default of transformers' `JambaConfig`, the sizes of Jamba-v0.1.
    /// Unknown keys are ignored.
    ///
    /// # Errors
    /// [`Error::Json`] or [`Error::Config`].
    pub fn from_json(text: &str) -> Result<Self> {
        let value = serde_json::from_str(text)
            .map_err(|source| Error::Json { path: "config.json".into(), source })?;
        Self::from_value(&value)
    }

    fn from_value(value: &Value) -> Result<Self> {
        let field = Fields::new(value, "config.json")?;
        field.refuse_unsupported()?;

        let hidden_size = field.size_or("hidden_size", 4096)?;
        let vocab_size = field.size_or("vocab_size", 65_536)?;
        let num_attention_heads = field.size_or("num_attention_heads", 32)?;
        let num_experts = match field.size("num_local_experts")? {
            // Another name for the same; transformers prefers it too.
            Some(experts) => experts,
            None => field.size("num_experts")?.unwrap_or(16),
        };
        let config = Self {
            vocab_size,
            hidden_size,
            intermediate_size: field.size_or("intermediate_size", 14_336)?,
            num_hidden_layers: field.size_or("num_hidden_layers", 32)?,
            num_attention_heads,
            num_key_value_heads: match field.size("num_key_value_heads")? {
                Some(heads) => heads,
                None if field.is_null("num_key_value_heads") => num_attention_heads,
                None => 8,
            },
            head_dim: match field.size("head_dim")? {
                Some(head_dim) => head_dim,
                None if num_attention_heads == 0 || hidden_size % num_attention_heads != 0 => {
                    return Err(heads_do_not_divide(num_attention_heads, hidden_size));
                }
                None => hidden_size / num_attention_heads,
            },
            attn_layer_period: field.size("attn_layer_period")?.unwrap_or(8),
            attn_layer_offset: field.size("attn_layer_offset")?.unwrap_or(4),
            expert_layer_period: field.size("expert_layer_period")?.unwrap_or(2),
            expert_layer_offset: field.size("expert_layer_offset")?.unwrap_or(1),
            num_experts,
            num_experts_per_tok: field.size("num_experts_per_tok")?.unwrap_or(2),
            mamba_d_state: field.size("mamba_d_state")?.unwrap_or(16),
            mamba_d_conv: field.size("mamba_d_conv")?.unwrap_or(4),
            mamba_expand: field.size("mamba_expand")?.unwrap_or(2),
            mamba_dt_rank: field.dt_rank(hidden_size)?,
            mamba_conv_bias: field.flag("mamba_conv_bias")?.unwrap_or(true),
            mamba_proj_bias: field.flag("mamba_proj_bias")?.unwrap_or(false),
            rms_norm_eps: field.float("rms_norm_eps")?.unwrap_or(1e-6),
            tie_word_embeddings: field.flag("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: match field.id("bos_token_id")? {
                None if !field.is_null("bos_token_id") => Some(1),
                id => id,
            },
            eos_token_ids: match field.ids("eos_token_id")? {
                Some(ids) => ids,
                None if field.is_null("eos_token_id") => vec![],
                None => vec![2],
            },
            max_position_embeddings: match field.size("max_position_embeddings")? {
                Some(n) => Some(n),
                None => field.size("n_ctx")?,
            },
            dtype: field.dtype()?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Inner width of the Mamba mixer, `mamba_expand * hidden_size`.
    pub fn d_inner(&self) -> usize {
        self.mamba_expand * self.hidden_size
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Checks every rule that the rest of the crate relies on.
    ///
    /// # Errors
    /// [`Error::Config`] with the field, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_SIZE),
            ("num_key_value_heads", self.num_key_value_heads, MAX_SIZE),
            ("head_dim", self.head_dim, MAX_SIZE),
            ("attn_layer_period", self.attn_layer_period, MAX_SIZE),
            ("expert_layer_period", self.expert_layer_period, MAX_SIZE),
            ("mamba_d_state", self.mamba_d_state, MAX_LAYERS),
            ("mamba_d_conv", self.mamba_d_conv, MAX_LAYERS),
            ("mamba_expand", self.mamba_expand, MAX_LAYERS),
            ("mamba_dt_rank", self.mamba_dt_rank, MAX_SIZE),
        ];
        for (field, value, max) in sizes {
            ensure((1..=max).contains(&value), field, value, || format!("1 to {max} is allowed"))?;
        }
        ensure(self.num_experts <= MAX_LAYERS, "num_experts", self.num_experts, || {
            format!("0 to {MAX_LAYERS} is allowed")
        })?;
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let products = [
            ("num_attention_heads", heads, "head_dim", self.head_dim, MAX_SIZE),
            ("num_key_value_heads", kv_heads, "head_dim", self.head_dim, MAX_SIZE),
            ("mamba_expand", self.mamba_expand, "hidden_size", self.hidden_size, MAX_SIZE),
            (
                "num_experts",
                self.num_experts,
                "num_hidden_layers",
                self.num_hidden_layers,
                MAX_EXPERTS,
            ),
        ];
        for (field, factor, by_field, by, max) in products {
            let fits = factor.checked_mul(by).is_some_and(|product| product <= max);
            let allowed = || format!("times {by_field} ({by}) it must not pass {max}");
            ensure(fits, field, factor, allowed)?;
        }
        ensure(heads.is_multiple_of(kv_heads), "num_key_value_heads", kv_heads, || {
            format!("it must divide num_attention_heads ({heads})")
        })?;
        let offsets = [
            (
                "attn_layer_offset",
                self.attn_layer_offset,
                "attn_layer_period",
                self.attn_layer_period,
            ),
            (
                "expert_layer_offset",
                self.expert_layer_offset,
                "expert_layer_period",
                self.expert_layer_period,
            ),
        ];
        for (field, offset, period_field, period) in offsets {
            ensure(offset < period, field, offset, || {
                format!("it must be below {period_field} ({period})")
            })?;
        }
        if self.num_experts > 1 {
            let (k, n) = (self.num_experts_per_tok, self.num_experts);
            ensure((1..=n).contains(&k), "num_experts_per_tok", k, || {
                format!("1 to num_experts ({n}) is allowed")
            })?;
        }
        let eps = self.rms_norm_eps;
        ensure(eps.is_finite() && eps > 0.0, "rms_norm_eps", eps, || {
            "it must be positive and finite".into()
        })?;
        self.bos_token_id.map_or(Ok(()), |id| self.check_id(FILE, "bos_token_id", id))?;
        self.check_eos(FILE)
    }

    fn check_eos(&self, file: &'static str) -> Result<()> {
        self.eos_token_ids.iter().try_for_each(|id| self.check_id(file, "eos_token_id", *id))
    }

    fn check_id(&self, file: &'static str, field: &'static str, id: u32) -> Result<()> {
        let vocab = self.vocab_size;
        if usize::try_from(id).is_ok_and(|id| id < vocab) {
            return Ok(());
        }
        let allowed = format!("it must be below vocab_size ({vocab})");
        Err(Error::Config { file, field, value: id.to_string(), allowed })
    }
}

fn ensure(
    holds: bool,
    field: &'static str,
    value: impl ToString,
    allowed: impl FnOnce() -> String,
) -> Result<()> {
    if holds { Ok(()) } else { Err(config_error(field, value, allowed())) }
}

fn config_error(field: &'static str, value: impl ToString, allowed: impl Into<String>) -> Error {
    Error::Config { file: FILE, field, value: value.to_string(), allowed: allowed.into() }
}

fn heads_do_not_divide(heads: usize, hidden_size: usize) -> Error {
    let allowed = format!("it must divide hidden_size ({hidden_size}) where head_dim is not given");
    config_error("num_attention_heads", heads, allowed)
}
