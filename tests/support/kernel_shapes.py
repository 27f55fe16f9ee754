"""The kernels that real checkpoints need, as lowerings: what compiles, what is gated, what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from dcompile.codegen.kernels import (
    advance,
    attend,
    gather,
    linear,
    moe_ffn,
    norm_rope_write,
    norms,
    route,
    route_limited,
    silu_mul,
    soft_embed,
    vocab_choice,
)
from dcompile.codegen.triton.variant import Lowering, Variant

R, B = {"R": 1}, {"B": 1}


@dataclass(frozen=True)
class Experts:
    count: int
    top_k: int
    width: int
    shared: int = 0
    score: str = "softmax"
    groups: int = 1
    kept: int = 1
    renormalize: bool = False
    scale: float = 1.0
    bias: str | None = None


@dataclass(frozen=True)
class Model:
    """The sizes of a checkpoint that its kernels depend on (bfloat16)."""

    hidden: int
    heads: int
    groups: int
    size: int
    vocab: int
    mask: int
    block: int
    rot: int
    norm: bool = True
    bias: bool = False
    ffn: int | None = None
    experts: Experts | None = None


MODELS = {
    "llada_moe": Model(*(2048, 16, 16, 128, 157184, 156895, 32, 128), experts=Experts(64, 8, 1024)),
    "llada2_mini": Model(
        *(2048, 16, 4, 128, 157184, 156895, 32, 64),
        ffn=5120,
        experts=Experts(256, 8, 512, 1, "sigmoid", 8, 4, True, 2.5, "f32"),
    ),
    "llada_8b": Model(*(4096, 32, 32, 128, 126464, 126336, 32, 128), norm=False, ffn=12288),
    "dream": Model(*(3584, 28, 4, 128, 152064, 151666, 32, 128), norm=False, bias=True, ffn=18944),
    "sdar_moe": Model(
        *(2048, 32, 4, 128, 151936, 151669, 4, 128),
        experts=Experts(128, 8, 768, renormalize=True),
    ),
}


def lowerings(model: Model, arch: int, positions: int = 4096) -> list[Lowering]:
    """Every kernel of a model's step, in the order of a layer."""
    m, dtype = model, "bf16"
    qkv = (m.heads + 2 * m.groups) * m.size
    found = [
        gather.canvas_launches(rows=R, positions=positions, width=m.hidden, dtype=dtype),
        gather.launches(rows=R, width=m.hidden, dtype=dtype),
        norms.launches(rows=R, hidden=m.hidden, dtype=dtype, eps=1e-5),
        norms.launches(rows=R, hidden=m.hidden, dtype=dtype, eps=1e-5, add=True),
        linear.launches(rows=R, n=qkv, k=m.hidden, dtype=dtype, arch=arch, bias=m.bias),
        norm_rope_write.launches(
            **{"rows": R, "heads": m.heads, "groups": m.groups, "size": m.size},
            **{"positions": positions, "rot": m.rot, "dtype": dtype, "eps": 1e-5},
            **{"q_norm": m.norm, "k_norm": m.norm},
        ),
        attend.launches(
            **{"rows": R, "heads": m.heads, "groups": m.groups, "size": m.size, "dtype": dtype},
            **{"positions": positions, "scale": m.size**-0.5, "arch": arch, "window": m.block},
        ),
        linear.launches(rows=R, n=m.hidden, k=m.heads * m.size, dtype=dtype, arch=arch),
    ]
    if m.ffn is not None:
        found += [
            linear.gated_launches(rows=R, n=m.ffn, k=m.hidden, dtype=dtype, arch=arch),
            linear.launches(rows=R, n=m.hidden, k=m.ffn, dtype=dtype, arch=arch),
            silu_mul.launches(rows=R, width=m.ffn, dtype=dtype),
        ]
    if m.experts is not None:
        found += _experts(m, m.experts, arch)
    found += [
        vocab_choice.launches(
            **{"sequences": B, "length": m.block, "hidden": m.hidden, "vocab": m.vocab},
            **{"mask_id": m.mask, "dtype": dtype, "arch": arch},
        ),
        soft_embed.launches(
            **{"rows": R, "vocab": m.vocab, "hidden": m.hidden, "width": m.hidden},
            **{"dtype": dtype, "arch": arch},
        ),
        advance.launches(sequences=B, most=8),
    ]
    return found


def _experts(m: Model, e: Experts, arch: int) -> list[Lowering]:
    router = {
        **{"rows": R, "num_experts": e.count, "top_k": e.top_k, "score": e.score, "bias": e.bias},
        **{"groups": e.groups, "kept_groups": e.kept, "renormalize": e.renormalize},
        **{"scale": e.scale, "dtype": "bf16"},
    }
    limits = {"capacity": 1.5, "overflow_reroutes": True, "pool": e.count // 2}
    experts = {
        **{"rows": R, "hidden": m.hidden, "width": e.width, "num_experts": e.count},
        **{"top_k": e.top_k, "dtype": "bf16", "arch": arch, "shared": e.shared},
    }
    return [
        linear.launches(rows=R, n=e.count, k=m.hidden, dtype="bf16", arch=arch),
        route.launches(**router),
        route.product_launches(hidden=m.hidden, **router),
        route_limited.launches(blocks=B, slots=8, block_length=m.block, **limits, **router),
        moe_ffn.launches(**experts),
        moe_ffn.launches(limited=True, **experts),
    ]


def variants(found: list[Lowering]) -> list[Variant]:
    """The distinct variants of some lowerings."""
    return list(dict.fromkeys(step.variant for lowering in found for step in lowering.steps))
