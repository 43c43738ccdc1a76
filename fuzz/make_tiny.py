"""Writes tiny/: a Jamba of every kind of layer in 12 KB, which the targets load and damage."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

CONFIG = dict(
    architectures=["JambaForCausalLM"], model_type="jamba", dtype="bfloat16", vocab_size=272,
    hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2,
    expert_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=2, mamba_d_conv=2,
    mamba_expand=2, mamba_dt_rank=1, mamba_conv_bias=True, mamba_proj_bias=False,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-6,
)
SPECIAL = ["<|startoftext|>", "<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>"]


def tensors():
    torch.manual_seed(0)
    c = CONFIG
    hidden, inter, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    inner, state, conv, rank = hidden * c["mamba_expand"], 2, 2, 1
    shapes = {"embed_tokens.weight": (vocab, hidden), "final_layernorm.weight": (hidden,)}
    for i in range(c["num_hidden_layers"]):
        layer = f"layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.pre_ff_layernorm.weight"] = (hidden,)
        if i % 3 == 1:
            for name, rows in [("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)]:
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
        else:
            shapes |= {f"{layer}.mamba.{name}": shape for name, shape in {
                "in_proj.weight": (2 * inner, hidden), "conv1d.weight": (inner, 1, conv),
                "conv1d.bias": (inner,), "x_proj.weight": (rank + 2 * state, inner),
                "dt_layernorm.weight": (rank,), "b_layernorm.weight": (state,),
                "c_layernorm.weight": (state,), "dt_proj.weight": (inner, rank),
                "dt_proj.bias": (inner,), "A_log": (inner, state), "D": (inner,),
                "out_proj.weight": (hidden, inner)}.items()}
        ff = f"{layer}.feed_forward"
        if i % 2 == 1:
            shapes[f"{ff}.router.weight"] = (2, hidden)
        for prefix in [f"{ff}.experts.0", f"{ff}.experts.1"] if i % 2 == 1 else [ff]:
            for name in ["gate", "up", "down"]:
                shapes[f"{prefix}.{name}_proj.weight"] = (inter, hidden)
    return {f"model.{name}": torch.randn(shape).mul(0.3).bfloat16() for name, shape in shapes.items()}


def tokenizer():
    letters = sorted(ByteLevel.alphabet())
    vocab = {token: id for id, token in enumerate(SPECIAL + letters)}
    merges = [["h", "e"], ["t", "he"], ["Ġ", "t"], ["i", "n"]]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    special = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False,
                    normalized=False, special=True) for i, t in enumerate(SPECIAL)]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None,
                pre_tokenizer=level, post_processor=None, decoder=level,
                model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                           end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                           ignore_merges=False, vocab=vocab, merges=merges))


folder = Path(__file__).parent / "tiny"
folder.mkdir(exist_ok=True)
write = lambda name, value: (folder / name).write_text(json.dumps(value, ensure_ascii=False) + "\n")
write("config.json", CONFIG)
write("tokenizer.json", tokenizer())
write("tokenizer_config.json", dict(add_bos_token=True, bos_token=SPECIAL[0], eos_token=SPECIAL[1]))
save_file(tensors(), folder / "model.safetensors", metadata=dict(format="pt"))
