"""The CPU library's kernels in the words of the operators; arguments have the names of `abi_table.h`."""

from __future__ import annotations

from collections.abc import Mapping

from dcompile.codegen.operands import Kernel, one

_CHOICE = "token confidence margin entropy x[C,D] weight=w[V,D] bias live temperature seed tick pos"

KERNELS: Mapping[str, Kernel] = {
    "embedding": one("embedding", "out[R,D] weight=table indices=ids"),
    "gather_rows": one("index_select", "out self=x index"),
    "rms_norm": one("rms_norm", "y[R,D] input=x[R,D] weight=w"),
    "add_rms_norm": one("add_rms_norm", "total=sum[R,D] y[R,D] x[R,D] r[R,D] weight=w"),
    "linear": one("linear", "y[R,N] input=x[R,K] weight=w[N,K] bias", beside="residual"),
    "silu_mul": one("silu_mul", "y[R,F] gate[R,F] up[R,F]"),
    "norm_rope_write": one(
        "norm_rope_write",
        "q=q_out[R,H,D] qkv q_norm k_norm cos sin row_seq row_pos keys values",
    ),
    "attend": one("attend", "o[R,H,D] q[R,H,D] keys values row_seq row_limit"),
    "route": one("route", "weights experts logits bias"),
    "route_limited": one(
        "route_limited", "weights experts logits bias row_seq row_pos block_seq block_pos"
    ),
    "moe_ffn": one(
        "moe_ffn",
        "y[R,D] x[R,D] weights[R,k] experts[R,k] gate_up down[E,D,F] gate_up_bias down_bias",
    ),
    "vocab_choice": one("vocab_choice", _CHOICE),
    "vocab_choice_asked": one("vocab_choice_asked", f"{_CHOICE} asked score asked_p asked_score"),
    "soft_embed": one("vocab_soft_embed", "y[R,E] x[R,D] head=w[V,D] bias table live weight"),
}
