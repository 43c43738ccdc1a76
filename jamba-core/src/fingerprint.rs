//! Which model a state belongs to.

use std::fmt;

use crate::config::Config;
use crate::tensor::Param;

/// Tells models apart: a hash of the configuration, of the name, shape and dtype of every
/// parameter, and of [`SAMPLE`] bytes at the beginning, in the middle and at the end of every
/// stored tensor.
///
/// It is made when a model is loaded and does not read all weights: two models that differ only
/// in bytes that are not sampled have the same fingerprint. Training changes every tensor, so this
/// takes an edit by hand. It is no defence against forgery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint([u64; 2]);

/// Bytes read at each of three places of a stored tensor.
pub const SAMPLE: usize = 64;

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}

impl Fingerprint {
    /// What [`Display`](fmt::Display) wrote.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (high, low) = (text.len() == 32).then(|| text.split_at_checked(16)).flatten()?;
        let word = |part| u64::from_str_radix(part, 16).ok();
        Some(Self([word(high)?, word(low)?]))
    }
}

/// The values of a configuration that decide what is computed, by name. Ids of special tokens and
/// the context that a model was trained for are not among them.
pub(crate) fn essentials(config: &Config) -> Vec<(&'static str, String)> {
    vec![
        ("num_hidden_layers", config.num_hidden_layers.to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("vocab_size", config.vocab_size.to_string()),
        ("intermediate_size", config.intermediate_size.to_string()),
        ("num_attention_heads", config.num_attention_heads.to_string()),
        ("num_key_value_heads", config.num_key_value_heads.to_string()),
        ("head_dim", config.head_dim.to_string()),
        ("attn_layer_period", config.attn_layer_period.to_string()),
        ("attn_layer_offset", config.attn_layer_offset.to_string()),
        ("expert_layer_period", config.expert_layer_period.to_string()),
        ("expert_layer_offset", config.expert_layer_offset.to_string()),
        ("num_experts", config.num_experts.to_string()),
        ("num_experts_per_tok", config.num_experts_per_tok.to_string()),
        ("mamba_d_state", config.mamba_d_state.to_string()),
        ("mamba_d_conv", config.mamba_d_conv.to_string()),
        ("mamba_expand", config.mamba_expand.to_string()),
        ("mamba_dt_rank", config.mamba_dt_rank.to_string()),
        ("mamba_conv_bias", config.mamba_conv_bias.to_string()),
        ("mamba_proj_bias", config.mamba_proj_bias.to_string()),
        ("rms_norm_eps", config.rms_norm_eps.to_string()),
        ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
    ]
}

/// Makes a [`Fingerprint`] of what it is given, in order.
pub(crate) struct Hasher([u64; 2]);

impl Hasher {
    pub(crate) fn new() -> Self {
        Self([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344])
    }

    pub(crate) fn word(&mut self, word: u64) {
        let [a, b] = self.0;
        self.0 = [
            (a ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29),
            (b.rotate_left(31) ^ word).wrapping_mul(0xc2b2_ae3d_27d4_eb4f),
        ];
    }

    /// Bytes and how many they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.word(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.word(u64::from_le_bytes(last));
        }
    }

    pub(crate) fn config(&mut self, config: &Config) {
        for (name, value) in essentials(config) {
            self.bytes(name.as_bytes());
            self.bytes(value.as_bytes());
        }
    }

    pub(crate) fn param(&mut self, param: &Param) {
        self.bytes(param.name.as_bytes());
        param.shape.iter().for_each(|&n| self.word(n as u64));
        for part in &param.parts {
            self.bytes(part.dtype().to_string().as_bytes());
            part.shape().iter().for_each(|&n| self.word(n as u64));
            let size = part.dtype().size();
            let len = size * part.shape().iter().product::<usize>();
            for start in [0, len / 2, len.saturating_sub(SAMPLE)] {
                let end = len.min(start + SAMPLE);
                // An element may begin before the middle.
                let elements = start / size..end.div_ceil(size);
                let before = start - elements.start * size;
                self.bytes(&part.read(elements)[before..before + end - start]);
            }
        }
    }

    pub(crate) fn finish(&self) -> Fingerprint {
        // The finaliser of MurmurHash3: every bit of the input reaches every bit of the result.
        let mix = |mut h: u64| {
            h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
            h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
            h ^ (h >> 33)
        };
        let [a, b] = self.0;
        Fingerprint([mix(a ^ b.rotate_left(17)), mix(b)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{HostTensor, Role};

    fn of(values: Vec<f32>) -> Fingerprint {
        let mut hasher = Hasher::new();
        hasher.param(&Param::new("w", Role::Linear, HostTensor::from_f32(vec![1, 300], values)));
        hasher.finish()
    }

    #[test]
    fn sampled_bytes_count() {
        let base = of(vec![0.5; 300]);
        for at in [0, 15, 150, 299] {
            let mut values = vec![0.5; 300];
            values[at] = 0.25;
            assert_ne!(of(values), base, "value {at}");
        }
        assert_eq!(of(vec![0.5; 300]), base);
        assert_eq!(Fingerprint::parse(&base.to_string()), Some(base));
        assert_eq!(Fingerprint::parse("12"), None);
    }

    #[test]
    fn configurations_differ() {
        let of = |config: &Config| {
            let mut hasher = Hasher::new();
            hasher.config(config);
            hasher.finish()
        };
        let config = Config::preset("jamba-v0.1").unwrap();
        let other = Config { num_experts_per_tok: 1, ..config.clone() };
        let context = Config { max_position_embeddings: None, ..config.clone() };
        assert_ne!(of(&config), of(&other));
        assert_eq!(of(&config), of(&context));
    }
}
