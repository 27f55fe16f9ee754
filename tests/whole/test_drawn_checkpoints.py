"""Checkpoints of drawn sizes, each family: the artifact's tokens are those of a plain decode."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from checkpoints import FAMILIES, write_checkpoint
from slow import decode

import dcompile
from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options


def draw(family: str, rng: random.Random) -> dict[str, object]:
    """Config keys: sizes that no tile divides, one expert or all of them, kinds of layers in any order."""
    groups = rng.choice([1, 2, 3])
    heads = groups * rng.choice([1, 1, 2, 3, 4])
    width = rng.choice([2, 4, 6, 8, 10, 16, 20, 32])
    layers, inner = rng.choice([1, 2, 3, 4]), rng.choice([1, 3, 17, 31, 88])
    experts, expert = rng.choice([1, 2, 3, 5, 7, 8, 16]), rng.choice([1, 5, 24])
    chosen = rng.randint(1, experts)
    if family == "llada":
        return {
            **{"d_model": heads * width, "n_heads": heads, "n_kv_heads": groups},
            **{"n_layers": layers, "mlp_hidden_size": inner, "weight_tying": rng.random() < 0.5},
            **{"rope_full_precision": rng.random() < 0.5, "rope_theta": rng.choice([1e2, 5e5])},
        }
    # Where the config says a head's size, the hidden size need not be theirs together.
    apart = family in ("llada2", "sdar", "sdar_moe")
    config: dict[str, object] = {
        "hidden_size": rng.choice([24, 40, 64]) if apart else heads * width,
        **{"num_attention_heads": heads, "num_key_value_heads": groups},
        **{"num_hidden_layers": layers, "tie_word_embeddings": rng.random() < 0.4},
        "intermediate_size": inner,
    }
    if apart:
        config |= {"head_dim": width, "block_length": rng.choice([3, 4, 8, 32])}
    moe: dict[str, object] = {
        **{"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": expert},
        "norm_topk_prob": rng.random() < 0.5,
    }
    if family == "llada_moe":
        del config["intermediate_size"], moe["moe_intermediate_size"], moe["norm_topk_prob"]
        config |= {
            **{"dense_intermediate_size": inner, "expert_intermediate_size": expert, **moe},
            "moe_layer_freq": [rng.randint(0, 1) for _ in range(layers)],
            "qk_layernorm": rng.random() < 0.6,
        }
    if family == "sdar_moe":
        dense = [i for i in range(layers) if rng.random() < 0.3]
        config |= {**moe, "mlp_only_layers": dense}
    if family == "llada2":
        of, each = rng.choice([1, 2, 4]), rng.choice([2, 3, 4])
        kept, turned = rng.randint(1, of), rng.choice(range(2, width + 1, 2))
        config |= {
            **moe,
            **{"n_group": of, "topk_group": kept, "num_experts": of * each},
            **{"num_experts_per_tok": rng.randint(2, each * kept), "rotary_dim": turned},
            "norm_topk_prob": True,
            **{
                "partial_rotary_factor": turned / width,
                "num_shared_experts": rng.choice([0, 1, 2]),
            },
            "first_k_dense_replace": rng.randint(0, layers),
        }
    return config


def agree(folder: Path, family: str, rng: random.Random, config: dict[str, object]) -> None:
    """Compile without a cache, generate from drawn prompts, compare tokens and forwards."""
    checkpoint = open_checkpoint(write_checkpoint(folder / "checkpoint", family, **config))
    spec, own = checkpoint.spec, rng.choice([1, 3, 8])
    block = spec.block_length or own
    length, threshold = block * rng.choice([1, 2, 3]), rng.choice([0.02, 0.05, 0.5])
    options = Options(
        max_length=128,
        batch=rng.choice([1, 3]),
        block_length=None if spec.block_length else own,
        cache="none",
    )
    made = compile_checkpoint(folder / "checkpoint", options, folder / "model.dcx")
    # Of nothing but masks one layer predicts the same everywhere, and rounding says which is surest.
    prompts = [[rng.randrange(100) for _ in range(rng.choice([1, 2, 5, 13]))] for _ in range(3)]
    asked = {"gen_length": length, "threshold": threshold, "early_stop": False}
    results = dcompile.load(made).generate(prompts, **asked)
    reference = checkpoint.reference()
    for prompt, result in zip(prompts, results, strict=True):
        want = decode(
            reference,
            prompt,
            length,
            block,
            spec.mask_id,
            aligned=spec.block_length is not None,
            shift=spec.shift,
            threshold=threshold,
        )
        assert (result.all_tokens, result.forwards) == want, (config, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_sizes(tmp_path: Path, family: str) -> None:
    rng = random.Random(f"{family} 1")
    agree(tmp_path, family, rng, draw(family, rng))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("family", FAMILIES)
def test_more_drawn_sizes(tmp_path: Path, family: str, seed: int) -> None:
    rng = random.Random(f"{family} {seed}")
    agree(tmp_path, family, rng, draw(family, rng))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llada2", {"num_hidden_layers": 4, "first_k_dense_replace": 2}),
        ("llada_moe", {"num_hidden_layers": 6, "moe_layer_freq": [1, 1, 0, 0, 0, 1]}),
        ("sdar_moe", {"num_hidden_layers": 5, "mlp_only_layers": [0, 1, 3]}),
    ],
)
def test_kinds_of_layers_in_any_order(
    tmp_path: Path, family: str, config: dict[str, object]
) -> None:
    """A copied layer may have the index that a later kind would have among the traced ones."""
    agree(tmp_path, family, random.Random(family), config)
