//! The published models by name: their shapes without their files, to measure and to plan on; and
//! those of others to measure beside them.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// One shape and the models that have it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Preset {
    /// Name, in lower case.
    pub name: &'static str,
    /// Other names, of models of the same shape.
    pub aliases: &'static [&'static str],
    /// One line on what it is.
    pub about: &'static str,
    config: fn() -> Config,
}

impl Preset {
    /// The shape. Its one end-of-text token is 2: a chat model's own `config.json` may list more.
    pub fn config(&self) -> Config {
        (self.config)()
    }

    /// The name, then the aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }
}

const PRESETS: &[Preset] = &[
    Preset {
        name: "jamba-v0.1",
        aliases: &["jamba-1.5-mini", "jamba-1.6-mini", "jamba-1.7-mini", "jamba2-mini"],
        about: "52B parameters, 12B active: 4 blocks of 8 layers, 16 experts (arXiv 2403.19887)",
        config: mini,
    },
    Preset {
        name: "jamba-1.5-large",
        aliases: &["jamba-1.6-large", "jamba-1.7-large"],
        about: "398B parameters, 94B active: 9 blocks of 8 layers, 16 experts (arXiv 2408.12570)",
        config: large,
    },
    Preset {
        name: "jamba-reasoning-3b",
        aliases: &["jamba2-3b"],
        about: "3B parameters, dense: 2 blocks of 14 layers",
        config: dense_3b,
    },
    Preset {
        name: "block52",
        aliases: &[],
        about: "13.3B parameters: one block of jamba-v0.1 at its full width, to measure on",
        config: block52,
    },
    Preset {
        name: "jamba-tales-11m",
        aliases: &[],
        about: "11M parameters: the demo model of this project, one block of tiny width",
        config: tales,
    },
    Preset {
        name: "mixtral-8x7b",
        aliases: &[],
        about: "46.7B parameters, 12.9B active: attention and 8 experts in every layer (arXiv \
                2401.04088); without rotary embeddings: a shape to measure beside, not the model",
        config: mixtral,
    },
    Preset {
        name: "llama-2-70b",
        aliases: &[],
        about: "69B parameters, dense: attention in every layer (arXiv 2307.09288); without rotary \
                embeddings: a shape to measure beside, not the model",
        config: llama_2_70b,
    },
];

/// All presets.
pub fn presets() -> &'static [Preset] {
    PRESETS
}

/// All names, aliases among them.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().flat_map(Preset::names)
}

/// The preset of this name or alias, upper or lower case.
///
/// # Errors
/// [`Error::UnknownPreset`], which lists the names.
pub fn find(name: &str) -> Result<&'static Preset> {
    PRESETS.iter().find(|preset| preset.names().any(|n| n.eq_ignore_ascii_case(name))).ok_or_else(
        || Error::UnknownPreset {
            name: name.into(),
            known: names().collect::<Vec<_>>().join(", "),
        },
    )
}

impl Config {
    /// The shape of a published model, by any name of [`preset::names`](names), upper or lower
    /// case.
    ///
    /// ```
    /// let config = jamba_core::Config::preset("Jamba-v0.1")?;
    /// assert_eq!(config.num_experts, 16);
    /// # Ok::<(), jamba_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::UnknownPreset`], which lists the names.
    pub fn preset(name: &str) -> Result<Self> {
        Ok(find(name)?.config())
    }
}

fn mini() -> Config {
    Config {
        vocab_size: 65_536,
        hidden_size: 4_096,
        intermediate_size: 14_336,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        attn_layer_period: 8,
        attn_layer_offset: 4,
        expert_layer_period: 2,
        expert_layer_offset: 1,
        num_experts: 16,
        num_experts_per_tok: 2,
        mamba_d_state: 16,
        mamba_d_conv: 4,
        mamba_expand: 2,
        mamba_dt_rank: 256,
        mamba_conv_bias: true,
        mamba_proj_bias: false,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        max_position_embeddings: Some(262_144),
        dtype: Some(Dtype::Bf16),
    }
}

fn large() -> Config {
    Config {
        hidden_size: 8_192,
        intermediate_size: 24_576,
        num_hidden_layers: 72,
        num_attention_heads: 64,
        mamba_dt_rank: 512,
        ..mini()
    }
}

fn dense_3b() -> Config {
    Config {
        hidden_size: 2_560,
        intermediate_size: 8_192,
        num_hidden_layers: 28,
        num_attention_heads: 20,
        num_key_value_heads: 1,
        attn_layer_period: 14,
        attn_layer_offset: 7,
        num_experts: 1,
        num_experts_per_tok: 1,
        mamba_dt_rank: 160,
        tie_word_embeddings: true,
        ..mini()
    }
}

fn block52() -> Config {
    Config { num_hidden_layers: 8, ..mini() }
}

fn tales() -> Config {
    Config {
        vocab_size: 4_096,
        hidden_size: 256,
        intermediate_size: 128,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 32,
        mamba_dt_rank: 16,
        tie_word_embeddings: true,
        ..mini()
    }
}

/// Weights, matrix products, attention and KV cache are those of the published model. Its rotary
/// embeddings, which this architecture does not have, would cost next to nothing beside them. What is
/// said of Mamba concerns no layer.
fn mixtral() -> Config {
    Config {
        vocab_size: 32_000,
        attn_layer_period: 1,
        attn_layer_offset: 0,
        expert_layer_period: 1,
        expert_layer_offset: 0,
        num_experts: 8,
        rms_norm_eps: 1e-5,
        max_position_embeddings: Some(32_768),
        ..mini()
    }
}

/// As [`mixtral`] is.
fn llama_2_70b() -> Config {
    Config {
        hidden_size: 8_192,
        intermediate_size: 28_672,
        num_hidden_layers: 80,
        num_attention_heads: 64,
        num_experts: 1,
        num_experts_per_tok: 1,
        max_position_embeddings: Some(4_096),
        ..mixtral()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::schedule::ParamCount;

    fn parsed(file: &str) -> Config {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/configs").join(file);
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Config::from_json(&text).unwrap()
    }

    #[test]
    fn every_name_is_found_in_any_case_and_valid() {
        for name in names() {
            assert_eq!(name, name.to_lowercase());
            let config = Config::preset(name).unwrap();
            config.validate().unwrap();
            assert_eq!(Config::preset(&name.to_uppercase()).unwrap(), config);
        }
    }

    #[test]
    fn every_published_name_is_there_once() {
        let mut all: Vec<_> = names().collect();
        all.sort_unstable();
        assert_eq!(
            all,
            [
                "block52",
                "jamba-1.5-large",
                "jamba-1.5-mini",
                "jamba-1.6-large",
                "jamba-1.6-mini",
                "jamba-1.7-large",
                "jamba-1.7-mini",
                "jamba-reasoning-3b",
                "jamba-tales-11m",
                "jamba-v0.1",
                "jamba2-3b",
                "jamba2-mini",
                "llama-2-70b",
                "mixtral-8x7b",
            ]
        );
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let message = Config::preset("jamba-9").unwrap_err().to_string();
        assert!(message.contains("`jamba-9`"), "{message}");
        for name in names() {
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn presets_equal_the_published_files() {
        let files = [
            ("jamba-v0.1", "v0_1.json"),
            ("jamba-v0.1", "v0_1_first_release.json"),
            ("jamba-1.5-large", "large_398b.json"),
            ("jamba-reasoning-3b", "reasoning_3b.json"),
            ("jamba-reasoning-3b", "transformers_5_style.json"),
        ];
        for (name, file) in files {
            let preset = Config::preset(name).unwrap();
            let parsed = parsed(file);
            assert!(preset.eos_token_ids.iter().all(|id| parsed.eos_token_ids.contains(id)));
            let eos_token_ids = parsed.eos_token_ids.clone();
            assert_eq!(Config { eos_token_ids, ..preset }, parsed, "{name} and {file}");
        }
    }

    #[test]
    fn the_demo_preset_equals_its_folder() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m");
        assert_eq!(
            Config::preset("jamba-tales-11m").unwrap(),
            Config::from_folder(folder).unwrap()
        );
    }

    #[test]
    fn parameter_counts_are_the_published() {
        // In thousands of millions: total, and active where it is published and not the total.
        let published: [(&str, f64, Option<f64>); 6] = [
            ("jamba-v0.1", 51.6, Some(12.0)),
            ("jamba-1.5-large", 398.0, Some(94.0)),
            ("jamba-reasoning-3b", 3.03, None),
            ("block52", 13.3, None),
            ("mixtral-8x7b", 46.7, Some(12.9)),
            ("llama-2-70b", 69.0, None),
        ];
        // Published figures are rounded, that of the large model downwards (398.56).
        let close =
            |count: u64, published: f64| (count as f64 / 1e9 / published - 1.0).abs() < 0.02;
        for (name, total, active) in published {
            let count = ParamCount::new(&Config::preset(name).unwrap());
            assert!(close(count.total, total), "{name}: {count:?}");
            assert!(active.is_none_or(|active| close(count.active, active)), "{name}: {count:?}");
        }
        for dense in [dense_3b(), llama_2_70b()] {
            let count = ParamCount::new(&dense);
            assert_eq!(count.total, count.active);
        }
        // The elements of its model.safetensors.
        assert_eq!(ParamCount::new(&tales()).total, 10_982_480);
    }
}
