//! What a model needs in memory, from its configuration alone: weights in a format, KV cache per
//! token, Mamba state per sequence.
//!
//! A session needs all three and its [`Scratch`]. Only the KV cache grows with the context, and only
//! attention layers have one: that is what makes long contexts cheap (arXiv 2403.19887, Table 1).
//!
//! ```
//! use jamba_core::{Config, memory};
//!
//! let config = Config::preset("jamba-v0.1")?;
//! assert_eq!(memory::kv_bytes(&config, 256 * 1024, 2), 4 << 30);
//! # Ok::<(), jamba_core::Error>(())
//! ```

use std::fs;
use std::path::Path;

use crate::backend::{Limits, Scratch};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::quant::WeightFormat;
use crate::schedule::Schedule;
use crate::tensor::Dtype;
use crate::weights::Weights;

/// Bytes of all parameters of the model that a valid `config` describes; a tied head counts once.
///
/// What the format keeps as stored counts in the dtype that the configuration names, bf16 where it
/// names none; a checkpoint may store some of it otherwise.
pub fn weight_bytes(config: &Config, format: WeightFormat) -> u64 {
    let stored = config.dtype.unwrap_or(Dtype::Bf16);
    let mut bytes = 0;
    Weights::layout(config).for_each(|param| {
        bytes += format.layout(param.role).bytes(param.matrix_shape(), stored);
    });
    bytes
}

/// Bytes that one token of context takes in the KV caches of all attention layers of a valid
/// `config`, with keys and values of `element_bytes` each.
pub fn kv_bytes_per_token(config: &Config, element_bytes: usize) -> u64 {
    let layers = Schedule::new(config).attention_layers() as u64;
    (layers * 2 * config.kv_width() as u64).saturating_mul(element_bytes as u64)
}

/// Bytes of the KV caches of `tokens` tokens, of one sequence or of several together;
/// `u64::MAX` if they are more.
pub fn kv_bytes(config: &Config, tokens: usize, element_bytes: usize) -> u64 {
    kv_bytes_per_token(config, element_bytes).saturating_mul(tokens as u64)
}

/// Bytes of the Mamba state of one sequence, whatever its length: in each Mamba layer
/// `d_inner * d_state` elements of f32 for the scan, which sums over the whole context, and
/// `d_inner * (d_conv - 1)` of `conv_element_bytes` for the convolution, which are activations
/// and may be kept as such: 4 in f32, 2 in 16 bit.
pub fn mamba_state_bytes(config: &Config, conv_element_bytes: usize) -> u64 {
    let layers = Schedule::new(config).mamba_layers() as u64;
    let (d_state, taps) = (config.mamba_d_state as u64, config.mamba_d_conv as u64);
    let conv = (taps - 1).saturating_mul(conv_element_bytes as u64);
    (layers * config.d_inner() as u64).saturating_mul((d_state * 4).saturating_add(conv))
}

/// Bytes of the whole state of one sequence of `tokens` tokens: its KV caches with elements of
/// `element_bytes`, and its Mamba state in f32.
pub fn sequence_bytes(config: &Config, tokens: usize, element_bytes: usize) -> u64 {
    kv_bytes(config, tokens, element_bytes).saturating_add(mamba_state_bytes(config, 4))
}

/// How many sequences of `tokens` tokens fit `budget` bytes of state ([`sequence_bytes`]).
pub fn sequences_that_fit(
    config: &Config,
    tokens: usize,
    element_bytes: usize,
    budget: u64,
) -> u64 {
    budget / sequence_bytes(config, tokens, element_bytes).max(1)
}

/// Bytes of a [`Scratch`] of f32; `u64::MAX` if they are more.
pub fn scratch_bytes(config: &Config, limits: &Limits) -> u64 {
    let mut bytes = 0u64;
    let mut add = |[rows, cols]: [usize; 2]| {
        bytes = bytes.saturating_add((4 * cols as u64).saturating_mul(rows as u64));
        Ok(())
    };
    // Adding fails nowhere.
    let _ = Scratch::shapes(config, limits).try_map(&mut add);
    bytes
}

/// Bytes of memory that this program can still take, as Linux estimates them: of the machine's, and of
/// what its control groups (those of a container, say) are limited to. `None` on other systems.
pub fn available() -> Option<u64> {
    let of_machine = available_of(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_groups = left_by_groups(Path::new("/sys/fs/cgroup"), &groups);
    Some(of_groups.map_or(of_machine, |left| left.min(of_machine)))
}

fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Where a version of control groups says what a group is limited to and what it uses.
struct Hierarchy {
    folder: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat` with what is used for files, which the kernel takes back.
    cached: [&'static str; 2],
}

const UNIFIED: Hierarchy = Hierarchy {
    folder: "",
    limit: "memory.max",
    usage: "memory.current",
    cached: ["active_file ", "inactive_file "],
};

const VERSION_1: Hierarchy = Hierarchy {
    folder: "memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_active_file ", "total_inactive_file "],
};

impl Hierarchy {
    /// What a group leaves of its limit, `None` where it has none.
    fn left(&self, group: &Path) -> Option<u64> {
        let read = |name| fs::read_to_string(group.join(name)).ok();
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let (limit, usage) = (number(&read(self.limit)?)?, number(&read(self.usage)?)?);
        let stat = read("memory.stat").unwrap_or_default();
        let of_line =
            |line: &str| self.cached.iter().find_map(|name| number(line.strip_prefix(name)?));
        let cached: u64 = stat.lines().filter_map(of_line).sum();
        Some(limit.saturating_sub(usage.saturating_sub(cached)))
    }
}

/// The least that a control group leaves, of those that `/proc/self/cgroup` lists and the groups
/// around them.
fn left_by_groups(mounted: &Path, listed: &str) -> Option<u64> {
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next()?, fields.next()?);
        let hierarchy = match controllers {
            "" => UNIFIED,
            some if some.split(',').any(|name| name == "memory") => VERSION_1,
            _ => return None,
        };
        let folder = mounted.join(hierarchy.folder);
        let groups = Path::new(group.trim_start_matches('/')).ancestors();
        groups.filter_map(|group| hierarchy.left(&folder.join(group))).min()
    };
    listed.lines().filter_map(of_line).min()
}

/// Refuses what there is no memory for, where the system says how much it has: a system that gives
/// more than there is ends the process where it is written.
///
/// # Errors
/// [`Error::Memory`].
pub fn check(what: &'static str, bytes: u64) -> Result<()> {
    match available() {
        Some(free) if bytes > free => Err(Error::Memory { what, bytes, available: Some(free) }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::ParamCount;
    use crate::tensor::Role;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const CONTEXT: usize = 256 * 1024;

    fn preset(name: &str) -> Config {
        Config::preset(name).unwrap()
    }

    /// Elements of the parameters of some roles.
    fn elements(config: &Config, roles: &[Role]) -> u64 {
        let mut sum = 0;
        Weights::layout(config).for_each(|param| {
            sum += if roles.contains(&param.role) { param.elements() } else { 0 };
        });
        sum
    }

    #[test]
    fn what_linux_says_is_available() {
        let said = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nSwapFree: 0 kB\n";
        assert_eq!(available_of(said), Some(8_192_000_000));
        for other in ["", "MemTotal: 5 kB", "MemAvailable: x kB", "MemAvailable: 5"] {
            assert_eq!(available_of(other), None, "{other}");
        }
        assert_eq!(available().is_some(), cfg!(target_os = "linux"));
    }

    #[test]
    fn what_control_groups_leave() {
        let mounted = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &str| {
            let path = mounted.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        let left = |listed| left_by_groups(mounted.path(), listed);
        assert_eq!(left("0::/\n"), None);
        write("memory.max", "max\n");
        write("memory.current", "900\n");
        assert_eq!(left("0::/\n"), None);
        // Files that the kernel keeps count as free; a group within has no more than those around it.
        write("a/memory.max", "1000\n");
        write("a/memory.current", "900\n");
        write("a/memory.stat", "anon 300\ninactive_file 500\nactive_file 100\n");
        assert_eq!(left("0::/a\n"), Some(700));
        write("a/b/memory.max", "5000\n");
        write("a/b/memory.current", "100\n");
        assert_eq!(left("0::/a/b\n"), Some(700));
        // One that is not seen from within is passed over.
        assert_eq!(left("0::/a/unseen\n"), Some(700));
        write("memory/c/memory.limit_in_bytes", "400\n");
        write("memory/c/memory.usage_in_bytes", "600\n");
        let both = "9:name=systemd:/\n4:cpu,memory:/c\n0::/a\n";
        assert_eq!(left(both), Some(0));
        for broken in ["", ":", "0:", "0::", "x", "4:memory:c:d"] {
            assert_eq!(left(broken), None, "{broken}");
        }
    }

    #[test]
    fn kv_cache_is_that_of_table_1() {
        let jamba = preset("jamba-v0.1");
        assert_eq!(kv_bytes_per_token(&jamba, 2), 16 * 1024);
        assert_eq!(kv_bytes(&jamba, CONTEXT, 2), 4 * GIB);

        // The other rows, as models of this architecture with attention in every layer.
        let mixtral = preset("mixtral-8x7b");
        assert_eq!(kv_bytes(&mixtral, CONTEXT, 2), 32 * GIB, "Mistral and Mixtral");
        assert_eq!(mamba_state_bytes(&mixtral, 4), 0);
        let all_heads = Config { num_key_value_heads: 32, ..mixtral };
        assert_eq!(kv_bytes(&all_heads, CONTEXT, 2), 128 * GIB, "Llama-2 7B");
        assert_eq!(kv_bytes_per_token(&preset("llama-2-70b"), 2), 320 * 1024);
    }

    #[test]
    fn state_of_the_3b_is_what_llama_cpp_allocates() {
        let config = preset("jamba-reasoning-3b");
        assert_eq!(kv_bytes(&config, CONTEXT, 2), 256 * MIB);
        // 26 Mamba layers of 5,120 channels, both states in f32: 9.65 MiB.
        assert_eq!(mamba_state_bytes(&config, 4), 26 * 5_120 * (16 * 4 + 3 * 4));
        assert_eq!((mamba_state_bytes(&config, 4) as f64 / MIB as f64 * 100.0).round(), 965.0);
        assert_eq!(mamba_state_bytes(&config, 2), 26 * 5_120 * (16 * 4 + 3 * 2));
    }

    /// The table of `docs/state.md`.
    #[test]
    fn states_of_the_published_models() {
        let expected = [
            ("jamba-v0.1", 32 * 1024, 17_432_576, 145, 8_209),
            ("jamba-1.5-large", 72 * 1024, 78_446_592, 363, 18_507),
            ("jamba-reasoning-3b", 2 * 1024, 10_117_120, 18, 522),
            ("jamba-tales-11m", 512, 272_384, 2, 128),
        ];
        for (name, kv, mamba, short, long) in expected {
            let config = preset(name);
            assert_eq!(kv_bytes_per_token(&config, 4), kv, "{name}");
            assert_eq!(mamba_state_bytes(&config, 4), mamba, "{name}");
            let mib = |tokens| (sequence_bytes(&config, tokens, 4) + MIB / 2) / MIB;
            assert_eq!((mib(4096), mib(CONTEXT)), (short, long), "{name}");
            assert_eq!(sequences_that_fit(&config, 4096, 4, 3 * (mamba + 4096 * kv)), 3);
        }
    }

    #[test]
    fn experts_int8_leaves_room_for_a_million_tokens() {
        let config = preset("jamba-v0.1");
        // The shares that arXiv 2408.12570 gives: of the experts, and of experts and MLPs.
        let total = ParamCount::new(&config).total as f64;
        let experts = elements(&config, &[Role::Experts]);
        let with_mlps = elements(&config, &[Role::Experts, Role::Mlp]);
        assert!(experts as f64 / total > 0.85);
        assert!(with_mlps as f64 / total > 0.90);

        let gb = |bytes: u64| (bytes as f64 / 1e8).round() / 10.0;
        let bytes = weight_bytes(&config, WeightFormat::ExpertsInt8);
        assert_eq!(gb(experts), 45.1);
        assert_eq!(gb(bytes), 55.3);
        assert_eq!(gb(bytes + with_mlps - experts), 58.1, "with the dense MLPs in 16 bit");
        assert!(bytes + kv_bytes(&config, 1 << 20, 2) < 80_000_000_000);
    }

    #[test]
    fn formats_shrink_what_they_say() {
        for name in ["jamba-v0.1", "jamba-reasoning-3b", "jamba-tales-11m"] {
            let config = preset(name);
            let total = ParamCount::new(&config).total;
            let f32_always = elements(&config, &[Role::Vector, Role::Conv, Role::A]);
            let bytes = WeightFormat::ALL.map(|format| weight_bytes(&config, format));
            assert_eq!(bytes[0], 2 * total + 2 * f32_always, "{name}");
            assert!(bytes.is_sorted_by(|a, b| a > b), "{name}: {bytes:?}");
            let stored = Config { dtype: Some(Dtype::F32), ..config };
            assert_eq!(weight_bytes(&stored, WeightFormat::Stored), 4 * total, "{name}");
            // Nothing of a model in int4 but the router is as it is stored.
            let int4 = [&stored, &preset(name)].map(|c| weight_bytes(c, WeightFormat::Int4));
            assert_eq!(int4[0] - int4[1], 2 * elements(&stored, &[Role::Router]), "{name}");
        }
    }

    #[test]
    fn a_scale_per_output_channel_or_block_of_each_expert() {
        let config = preset("jamba-tales-11m");
        let mut seen = 0;
        Weights::layout(&config).for_each(|param| {
            if param.name == "model.layers.1.feed_forward.experts.gate_up_proj" {
                seen += 1;
                let (experts, rows, cols) = (16, 2 * 128, 256);
                let bytes = WeightFormat::ALL.map(|format| {
                    format.layout(param.role).bytes(param.matrix_shape(), Dtype::Bf16)
                });
                let of_row = [cols * 2, cols + 4, cols + cols / 32 * 2, cols / 2 + cols / 32 * 2];
                assert_eq!(bytes, of_row.map(|bytes| experts * rows * bytes));
            }
        });
        assert_eq!(seen, 1);
    }

    #[test]
    fn pure_models_have_one_kind_of_state() {
        let attention =
            Config { attn_layer_period: 1, attn_layer_offset: 0, ..preset("jamba-tales-11m") };
        assert_eq!(mamba_state_bytes(&attention, 4), 0);
        let mamba =
            Config { attn_layer_period: 9, attn_layer_offset: 8, ..preset("jamba-tales-11m") };
        assert_eq!(kv_bytes(&mamba, usize::MAX, 4), 0);
    }

    #[test]
    fn the_largest_valid_model_does_not_overflow() {
        let wide = 1 << 20;
        let config = Config {
            vocab_size: 1 << 24,
            hidden_size: wide,
            intermediate_size: wide,
            num_hidden_layers: 1 << 12,
            num_attention_heads: 1 << 12,
            num_key_value_heads: 1 << 12,
            head_dim: 1 << 8,
            attn_layer_period: 2,
            attn_layer_offset: 0,
            expert_layer_period: 1,
            expert_layer_offset: 0,
            num_experts: 1 << 6,
            num_experts_per_tok: 1 << 6,
            mamba_d_state: 1 << 12,
            mamba_d_conv: 1 << 12,
            mamba_expand: 1,
            mamba_dt_rank: wide,
            tie_word_embeddings: false,
            ..preset("jamba-v0.1")
        };
        config.validate().unwrap();
        let config = Config { dtype: Some(Dtype::F32), ..config };
        let bytes = weight_bytes(&config, WeightFormat::Stored);
        assert_eq!(bytes, 4 * ParamCount::new(&config).total);
        assert!(bytes > 1 << 61);
        assert_eq!(kv_bytes(&config, usize::MAX, usize::MAX), u64::MAX);
        assert_eq!(mamba_state_bytes(&config, usize::MAX), u64::MAX);
    }
}
