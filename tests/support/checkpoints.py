"""Small random checkpoints of every family, in the layout that their authors publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

FAMILIES = ("llada", "llada_moe", "llada2", "dream", "sdar", "sdar_moe")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
MASK, EOS = 129, 127

Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    **config_overrides: object,
) -> Path:
    """Writes config, weights and tokenizer; overrides replace config keys (`...` removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, dtype, **config_overrides)
    tensors = make_tensors(family, config, seed, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, mask_token="<|mdm_mask|>")
    if sharded:
        _save_shards(folder, tensors)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_model_pt(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: object,
) -> Path:
    """The same model as one file: {"config", "state_dict"}, the mask id in the config."""
    overrides = {"mask_token_id": MASK, **config_overrides}
    config = make_config(family, dtype, **overrides)
    tensors = make_tensors(family, config, seed, dtype)
    torch.save({"config": config, "state_dict": tensors}, path)
    return path


def make_config(family: str, dtype: torch.dtype, **overrides: object) -> dict[str, object]:
    """The family's config.json with small sizes; an override of `...` removes the key."""
    config = CONFIGS[family]() | {"torch_dtype": str(dtype).removeprefix("torch.")} | overrides
    return {key: value for key, value in config.items() if value is not ...}


def make_tensors(
    family: str, config: dict[str, object], seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random weights: norms near 1, projections large enough that tokens differ."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES[family](config).items():
        noise = torch.randn(shape, generator=random)
        kind = torch.float32 if name.endswith("expert_bias") else dtype
        made[name] = (1 + 0.1 * noise if _is_norm(name) else 0.15 * noise).to(kind)
    return made


def write_tokenizer(folder: Path, mask_token: str | None) -> None:
    """A word-level tokenizer.json of single characters with the special tokens at their ids."""
    special = {"<|endoftext|>": EOS} | ({mask_token: MASK} if mask_token else {})
    texts = {number: text for text, number in special.items()}
    texts |= {i: chr(32 + i) for i in range(95)} | {95: "<unk>"}
    # Without the fillers, the library would number the special tokens anew.
    vocab = {texts.get(i, f"<filler {i}>"): i for i in range(131)}
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, number in special.items()
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    cuts = [names[: len(names) // 3], names[len(names) // 3 :]]
    places: dict[str, str] = {}
    for i, part in enumerate(cuts, start=1):
        file = f"model-{i:05}-of-{len(cuts):05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _is_norm(name: str) -> bool:
    return "norm" in name or "ln_f" in name


def _llada_config() -> dict[str, object]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "d_model": 64,
        "embedding_size": 136,
        "eos_token_id": EOS,
        "include_bias": False,
        "include_qkv_bias": False,
        "layer_norm_type": "rms",
        "mask_token_id": MASK,
        "max_sequence_length": 256,
        "mlp_hidden_size": 88,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "vocab_size": 131,
        "weight_tying": False,
    }


def _hf_config() -> dict[str, object]:
    return {
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": 64,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 131,
    }


def _llada_moe_config() -> dict[str, object]:
    return _hf_config() | {
        "model_type": "llada",
        "architectures": ["LLaDAMoEModelLM"],
        "attention_bias": False,
        "dense_intermediate_size": 88,
        "expert_intermediate_size": 24,
        "moe_layer_freq": [1, 1],
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "shared_expert_intermediate_size": None,
    }


def _llada2_config() -> dict[str, object]:
    return _hf_config() | {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "intermediate_size": 88,
        "moe_intermediate_size": 24,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_shared_experts": 1,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "rotary_dim": 8,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "topk_group": 2,
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_sliding_window": False,
    }


def _dream_config() -> dict[str, object]:
    return _hf_config() | {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "intermediate_size": 88,
        "mask_token_id": MASK,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _sdar_config() -> dict[str, object]:
    return _hf_config() | {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "intermediate_size": 88,
        "mask_token_id": MASK,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _sdar_moe_config() -> dict[str, object]:
    return _sdar_config() | {
        "model_type": "sdar_moe",
        "architectures": ["SDARMoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }


def _llada_shapes(c: dict[str, object]) -> Shapes:
    hidden, inner, rows = _int(c, "d_model"), _int(c, "mlp_hidden_size"), _int(c, "embedding_size")
    shared = hidden // _int(c, "n_heads") * _int(c, "n_kv_heads")
    shapes: Shapes = {"model.transformer.wte.weight": (rows, hidden)}
    for i in range(_int(c, "n_layers")):
        each = {
            "attn_norm": (hidden,),
            "q_proj": (hidden, hidden),
            "k_proj": (shared, hidden),
            "v_proj": (shared, hidden),
            "attn_out": (hidden, hidden),
            "ff_norm": (hidden,),
            "ff_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "ff_out": (hidden, inner),
        }
        shapes |= {f"model.transformer.blocks.{i}.{n}.weight": s for n, s in each.items()}
    shapes["model.transformer.ln_f.weight"] = (hidden,)
    if not c["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (rows, hidden)
    return shapes


def _llada_moe_shapes(c: dict[str, object]) -> Shapes:
    shapes = _ends(c, "embed_tokens")
    frequency = c["moe_layer_freq"]
    assert isinstance(frequency, list)
    for i, moe in enumerate(frequency):
        at = f"model.layers.{i}"
        shapes |= _split_attention(c, at, qk_norm=bool(c["qk_layernorm"]))
        if moe:
            shapes |= _experts(c, f"{at}.mlp", _int(c, "expert_intermediate_size"))
        else:
            shapes |= _ffn(c, f"{at}.mlp", _int(c, "dense_intermediate_size"))
    return shapes


def _llada2_shapes(c: dict[str, object]) -> Shapes:
    shapes = _ends(c, "word_embeddings")
    hidden, inner, head = _int(c, "hidden_size"), _int(c, "moe_intermediate_size"), _head_dim(c)
    heads, kv_heads = _int(c, "num_attention_heads"), _int(c, "num_key_value_heads")
    for i in range(_int(c, "num_hidden_layers")):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.attention.query_key_value.weight": ((heads + 2 * kv_heads) * head, hidden),
            f"{at}.attention.dense.weight": (hidden, heads * head),
            f"{at}.attention.query_layernorm.weight": (head,),
            f"{at}.attention.key_layernorm.weight": (head,),
        }
        if i < _int(c, "first_k_dense_replace"):
            shapes |= _ffn(c, f"{at}.mlp", _int(c, "intermediate_size"))
            continue
        shapes |= _experts(c, f"{at}.mlp", inner)
        shapes[f"{at}.mlp.gate.expert_bias"] = (_int(c, "num_experts"),)
        if _int(c, "num_shared_experts"):
            width = inner * _int(c, "num_shared_experts")
            shapes |= _ffn(c, f"{at}.mlp.shared_experts", width)
    return shapes


def _dream_shapes(c: dict[str, object]) -> Shapes:
    shapes = _ends(c, "embed_tokens")
    for i in range(_int(c, "num_hidden_layers")):
        at = f"model.layers.{i}"
        shapes |= _split_attention(c, at, qk_norm=False)
        for part in ("q_proj", "k_proj", "v_proj"):
            width = shapes[f"{at}.self_attn.{part}.weight"][0]
            shapes[f"{at}.self_attn.{part}.bias"] = (width,)
        shapes |= _ffn(c, f"{at}.mlp", _int(c, "intermediate_size"))
    return shapes


def _sdar_shapes(c: dict[str, object]) -> Shapes:
    shapes = _ends(c, "embed_tokens")
    dense_only = c.get("mlp_only_layers", [])
    assert isinstance(dense_only, list)
    for i in range(_int(c, "num_hidden_layers")):
        at = f"model.layers.{i}"
        shapes |= _split_attention(c, at, qk_norm=True)
        if "num_experts" in c and i not in dense_only:
            shapes |= _experts(c, f"{at}.mlp", _int(c, "moe_intermediate_size"))
        else:
            shapes |= _ffn(c, f"{at}.mlp", _int(c, "intermediate_size"))
    return shapes


def _ends(c: dict[str, object], embedding: str) -> Shapes:
    table = (_int(c, "vocab_size"), _int(c, "hidden_size"))
    shapes: Shapes = {
        f"model.{embedding}.weight": table,
        "model.norm.weight": (_int(c, "hidden_size"),),
    }
    return shapes if c.get("tie_word_embeddings") else shapes | {"lm_head.weight": table}


def _split_attention(c: dict[str, object], at: str, qk_norm: bool) -> Shapes:
    hidden, head = _int(c, "hidden_size"), _head_dim(c)
    wide, shared = _int(c, "num_attention_heads") * head, _int(c, "num_key_value_heads") * head
    shapes: Shapes = {
        f"{at}.input_layernorm.weight": (hidden,),
        f"{at}.post_attention_layernorm.weight": (hidden,),
        f"{at}.self_attn.q_proj.weight": (wide, hidden),
        f"{at}.self_attn.k_proj.weight": (shared, hidden),
        f"{at}.self_attn.v_proj.weight": (shared, hidden),
        f"{at}.self_attn.o_proj.weight": (hidden, wide),
    }
    norms: Shapes = {f"{at}.self_attn.{part}.weight": (head,) for part in ("q_norm", "k_norm")}
    return shapes | norms if qk_norm else shapes


def _ffn(c: dict[str, object], at: str, inner: int) -> Shapes:
    hidden = _int(c, "hidden_size")
    wide = {part: (inner, hidden) for part in ("gate_proj", "up_proj")}
    shapes = wide | {"down_proj": (hidden, inner)}
    return {f"{at}.{part}.weight": shape for part, shape in shapes.items()}


def _experts(c: dict[str, object], at: str, inner: int) -> Shapes:
    experts = _int(c, "num_experts")
    shapes: Shapes = {f"{at}.gate.weight": (experts, _int(c, "hidden_size"))}
    for e in range(experts):
        shapes |= _ffn(c, f"{at}.experts.{e}", inner)
    return shapes


def _head_dim(c: dict[str, object]) -> int:
    if "head_dim" in c:
        return _int(c, "head_dim")
    return _int(c, "hidden_size") // _int(c, "num_attention_heads")


def _int(c: dict[str, object], key: str) -> int:
    value = c[key]
    assert isinstance(value, int)
    return value


CONFIGS: dict[str, Callable[[], dict[str, object]]] = {
    "llada": _llada_config,
    "llada_moe": _llada_moe_config,
    "llada2": _llada2_config,
    "dream": _dream_config,
    "sdar": _sdar_config,
    "sdar_moe": _sdar_moe_config,
}
SHAPES: dict[str, Callable[[dict[str, object]], Shapes]] = {
    "llada": _llada_shapes,
    "llada_moe": _llada_moe_shapes,
    "llada2": _llada2_shapes,
    "dream": _dream_shapes,
    "sdar": _sdar_shapes,
    "sdar_moe": _sdar_shapes,
}
