"""Each family's forward once more, from the published formulas, in numpy float64.

Shares no code with the frontends: reads tensors and config from the checkpoint's own files, loops
over heads and experts, and computes every softmax by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

Array = np.ndarray[Any, np.dtype[Any]]
Weights = dict[str, Array]
Config = dict[str, Any]

LLADA_PARTS = (
    "attn_norm",
    "q_proj",
    "k_proj",
    "v_proj",
    "attn_out",
    "ff_norm",
    "ff_proj",
    "up_proj",
    "ff_out",
)


def logits(folder: Path, ids: Array) -> Array:
    """ids [B, T] -> logits [B, T, V], each sequence by itself."""
    config: Config = json.loads((folder / "config.json").read_text())
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: t.double().numpy() for name, t in load_file(file).items()}
    forward = FORWARDS[config["architectures"][0]]
    return np.stack([forward(config, weights, one) for one in ids])


def llada(c: Config, w: Weights, ids: Array) -> Array:
    x = w["model.transformer.wte.weight"][ids]
    heads, kv_heads = c["n_heads"], c["n_kv_heads"]
    size = c["d_model"] // heads
    for i in range(c["n_layers"]):
        p = {part: w[f"model.transformer.blocks.{i}.{part}.weight"] for part in LLADA_PARTS}
        h = norm(x, p["attn_norm"], c)
        q = rope((h @ p["q_proj"].T).reshape(-1, heads, size), c["rope_theta"], size)
        k = rope((h @ p["k_proj"].T).reshape(-1, kv_heads, size), c["rope_theta"], size)
        v = (h @ p["v_proj"].T).reshape(-1, kv_heads, size)
        x = x + attention(q, k, v, None) @ p["attn_out"].T
        h = norm(x, p["ff_norm"], c)
        x = x + (silu(h @ p["ff_proj"].T) * (h @ p["up_proj"].T)) @ p["ff_out"].T
    head = "wte" if c["weight_tying"] else "ff_out"
    return norm(x, w["model.transformer.ln_f.weight"], c) @ w[f"model.transformer.{head}.weight"].T


def llada_moe(c: Config, w: Weights, ids: Array) -> Array:
    return qwen_like(c, w, ids, block=None)


def dream(c: Config, w: Weights, ids: Array) -> Array:
    return qwen_like(c, w, ids, block=None)


def sdar(c: Config, w: Weights, ids: Array) -> Array:
    return qwen_like(c, w, ids, block=c.get("block_length", c.get("block_size", 4)))


def qwen_like(c: Config, w: Weights, ids: Array, block: int | None) -> Array:
    """Separate q, k, v; norms and biases where the checkpoint has them."""
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or c["hidden_size"] // heads
    turned = int(size * c.get("partial_rotary_factor", 1))
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"

        def project(part: str, count: int, at: str = at) -> Array:
            y = h @ w[f"{at}.self_attn.{part}_proj.weight"].T  # noqa: B023 - called in this turn
            y = y + w.get(f"{at}.self_attn.{part}_proj.bias", 0.0)
            y = y.reshape(-1, count, size)
            gain = w.get(f"{at}.self_attn.{part}_norm.weight")
            return y if gain is None else norm(y, gain, c)

        h = norm(x, w[f"{at}.input_layernorm.weight"], c)
        q = rope(project("q", heads), c["rope_theta"], turned)
        k = rope(project("k", kv_heads), c["rope_theta"], turned)
        mixed = attention(q, k, project("v", kv_heads), block)
        x = x + mixed @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, w[f"{at}.post_attention_layernorm.weight"], c)
        if f"{at}.mlp.gate.weight" in w:
            x = x + softmax_moe(c, w, f"{at}.mlp", h)
        else:
            x = x + ffn(w, f"{at}.mlp", h)
    head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
    return norm(x, w["model.norm.weight"], c) @ w[f"{head}.weight"].T


def llada2(c: Config, w: Weights, ids: Array) -> Array:
    heads, kv_heads, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    turned = int(size * c["partial_rotary_factor"])
    block = c.get("block_length", c.get("block_size", 32))
    x = w["model.word_embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, w[f"{at}.input_layernorm.weight"], c)
        qkv = (h @ w[f"{at}.attention.query_key_value.weight"].T).reshape(len(ids), -1, size)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        q = norm(q, w[f"{at}.attention.query_layernorm.weight"], c)
        k = norm(k, w[f"{at}.attention.key_layernorm.weight"], c)
        q, k = rope(q, c["rope_theta"], turned), rope(k, c["rope_theta"], turned)
        x = x + attention(q, k, v, block) @ w[f"{at}.attention.dense.weight"].T
        h = norm(x, w[f"{at}.post_attention_layernorm.weight"], c)
        if i < c["first_k_dense_replace"]:
            x = x + ffn(w, f"{at}.mlp", h)
            continue
        routed = grouped_moe(c, w, f"{at}.mlp", h)
        x = x + routed
        if c["num_shared_experts"]:
            x = x + ffn(w, f"{at}.mlp.shared_experts", h)
    head = "model.word_embeddings" if c.get("tie_word_embeddings") else "lm_head"
    return norm(x, w["model.norm.weight"], c) @ w[f"{head}.weight"].T


def softmax_moe(c: Config, w: Weights, at: str, h: Array) -> Array:
    out = np.zeros_like(h)
    for t, row in enumerate(h):
        p = softmax(w[f"{at}.gate.weight"] @ row)
        chosen = np.argsort(-p, kind="stable")[: c["num_experts_per_tok"]]
        total = p[chosen].sum() if c["norm_topk_prob"] else 1.0
        for e in chosen:
            out[t] += p[e] / total * ffn(w, f"{at}.experts.{e}", row)
    return out


def grouped_moe(c: Config, w: Weights, at: str, h: Array) -> Array:
    groups, per_group = c["n_group"], c["num_experts"] // c["n_group"]
    out = np.zeros_like(h)
    for t, row in enumerate(h):
        s = 1 / (1 + np.exp(-(w[f"{at}.gate.weight"] @ row)))
        biased = s + w[f"{at}.gate.expert_bias"]
        of_group = [sum(sorted(g)[-2:]) for g in biased.reshape(groups, per_group)]
        kept = np.argsort(-np.array(of_group), kind="stable")[: c["topk_group"]]
        open_to = [e for e in range(c["num_experts"]) if e // per_group in kept]
        chosen = sorted(open_to, key=lambda e: -biased[e])[: c["num_experts_per_tok"]]
        total = sum(s[e] for e in chosen) + 1e-20
        for e in chosen:
            weight = s[e] / total * c["routed_scaling_factor"]
            out[t] += weight * ffn(w, f"{at}.experts.{e}", row)
    return out


def ffn(w: Weights, at: str, h: Array) -> Array:
    gate, up = h @ w[f"{at}.gate_proj.weight"].T, h @ w[f"{at}.up_proj.weight"].T
    return (silu(gate) * up) @ w[f"{at}.down_proj.weight"].T


def attention(q: Array, k: Array, v: Array, block: int | None) -> Array:
    """q [T, H, K], k and v [T, G, K] -> [T, H*K]; with a block, keys of later blocks are hidden."""
    length, heads, size = q.shape
    out = np.empty_like(q)
    for head in range(heads):
        shared = head // (heads // k.shape[1])
        for t in range(length):
            end = length if block is None else min(length, (t // block + 1) * block)
            p = softmax(k[:end, shared] @ q[t, head] / np.sqrt(size))
            out[t, head] = p @ v[:end, shared]
    return out.reshape(length, heads * size)


def rope(x: Array, theta: float, turned: int) -> Array:
    """Each pair (i, i + turned/2) turns by position * theta^(-2i/turned)."""
    out, half = x.copy(), turned // 2
    for t in range(x.shape[0]):
        for i in range(half):
            angle = t * theta ** (-2 * i / turned)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def norm(x: Array, gain: Array, c: Config) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * gain


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


FORWARDS = {
    "LLaDAModelLM": llada,
    "LLaDAMoEModelLM": llada_moe,
    "LLaDA2MoeModelLM": llada2,
    "DreamModel": dream,
    "SDARForCausalLM": sdar,
    "SDARMoeForCausalLM": sdar,
}
