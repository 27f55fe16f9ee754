"""The CUDA kernels in the words of the operators, by function; arguments have the kernels' own names.

A kernel that computes two operators has both, with what lies between them in no memory.  Where an
operator is several launches each states its share: its operands, and its part of the FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcompile.codegen.operands import Kernel, Part, one

_PLACES = "row_seq row_pos block_seq block_pos"

KERNELS: Mapping[str, Kernel] = {
    "linear:linear": one("linear", "y[_,N] input=x[_,K] weight=w bias", beside="other"),
    "linear:gated": Kernel(
        (
            Part("linear", "y=-[_,2*N] input=x[_,K] weight=w bias"),
            Part("silu_mul", "y[_,N] gate=-[_,N] up=-[_,N]"),
        )
    ),
    "silu_mul:activate_and_multiply": one("silu_mul", "y[_,F] gate[_,F] up[_,F]"),
    # Without a residual it is rms_norm.
    "norms:rms_norm": one(
        "add_rms_norm", "y[_,D] total[_,D] x[_,D] r[_,D] weight=w", beside="chosen"
    ),
    "gather:gather_rows": one("index_select", "out self=x index"),
    "gather:canvas_embedding": Kernel(
        (
            Part("index_select", "out=-[_] self=canvas index=row_seq"),
            Part("embedding", "out[_,WIDTH] weight=table indices=-[_]"),
        ),
        beside="row_pos",
    ),
    "norm_rope_write:norm_rope_write": one(
        "norm_rope_write", "q[_,H,SIZE] qkv q_norm k_norm cos sin row_seq row_pos keys values"
    ),
    "attend:attend": one(
        "attend", "o[_,H,SIZE] q[_,H,SIZE] keys values row_seq row_limit", beside="chosen"
    ),
    "route:route": one("route", "weights experts logits bias"),
    "route:route_product": Kernel(
        (
            Part("linear", "y=-[_,E] input=x[_,K] weight=w bias=b"),
            Part("route", "weights experts logits=-[_,E] bias"),
        )
    ),
    "route_limited:rank": one("route_limited", "logits bias", beside="keys", share=0),
    "route_limited:choose_within": one(
        "route_limited",
        f"weights experts logits bias {_PLACES}",
        beside="keys open_keys score factor",
    ),
    "route_limited:drop": one(
        "route_limited",
        "weights experts logits=-[_,E] row_seq",
        beside="first_weights first_experts score",
        share=0,
    ),
    "route_limited:reroute": one(
        "route_limited",
        "weights experts logits=-[_,E] row_seq",
        beside="kept_weights kept_experts open_keys score factor",
        share=0,
    ),
    # A shared expert is one more for each row.
    "moe_ffn:sort_by_expert": one(
        "moe_ffn", "experts[_,TOP] down=-[E,0,0]", beside="order counts", share=0
    ),
    "moe_ffn:gate_up": one(
        "moe_ffn",
        "x[_,K] experts=-[_,CHOICES] gate_up=w gate_up_bias=bias down=-[EXPERTS,K,N]",
        beside="hidden order",
        share=2 / 3,
    ),
    "moe_ffn:down": one(
        "moe_ffn",
        "y[_,N] weights experts=-[_,CHOICES] down=w[EXPERTS,N,K] down_bias=bias",
        beside="hidden order experts",
        share=1 / 3,
    ),
    "vocab_choice:choose_partly": one(
        "vocab_choice",
        "x[_,D] weight=w[V,D] bias live temperature seed tick pos",
        beside="found tokens",
    ),
    "vocab_choice:choose_finally": one(
        "vocab_choice_asked",
        "token[_] confidence margin entropy score=choice_score live x=-[_,1] weight=-[1,1]",
        beside="found tokens whole",
        share=0,
    ),
    # The logits of the tokens asked about once more.
    "vocab_choice:tell": Kernel(
        (
            Part("index_select", "out=-[_,S,D] self=w index=asked"),
            Part("linear", "y=-[_,S] input=x[_,D]"),
        ),
        beside="probability score",
    ),
    "soft_embed:soften": one(
        "vocab_soft_embed", "x[_,D] head=w[V,D] bias live table=-[V,0]", beside="logits"
    ),
    "soft_embed:mix": one("soft_embed", "y[_,N] logits[_,V] table live weight"),
}
WITHOUT_OPERATOR: Mapping[str, str] = {
    "advance:advance": "the loop's own launch, of which no plan has a place among its launches",
}
