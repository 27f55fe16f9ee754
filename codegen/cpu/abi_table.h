// What each kernel of the library takes and touches, for the runtime to hold a plan to
// (runtime/cpu/abi.py has the notation). T stands for f32, bf16 and f16.
#pragma once

#include "abi.h"

#define DC_ABI_OF(T)                                                                            \
    "embedding_" #T "  >out:" #T "[R,D] table:" #T "[D] ids:i64[R]<table/D R D; D>=1\n"         \
    "rms_norm_" #T "  >y:" #T "[R,D] x:" #T "[R,D] w?:" #T "[D] R D eps:f\n"                    \
    "add_rms_norm_" #T "  >sum:" #T "[R,D] >y:" #T "[R,D] x:" #T "[R,D] r:" #T "[R,D] "         \
    "w?:" #T "[D] R D eps:f\n"                                                                  \
    "linear_" #T "  >y:" #T "[R,N] x:" #T "[R,K] w:" #T "[{N,K}] bias?:" #T "[N] "              \
    "residual?:" #T "[R,N] R N K\n"                                                             \
    "silu_mul_" #T "  >y:" #T "[R,F] gate:" #T "[R*P+F-P] up:" #T "[R*Q+F-Q] R F P Q; P>=F Q>=F\n" \
    "norm_rope_write_" #T "  >q_out:" #T "[R,H,D] *keys:" #T "[@N,L,G,D] "                      \
    "*values:" #T "[@N,L,G,D] qkv:" #T "[R,H+2*G,D] q_norm?:" #T "[D] k_norm?:" #T "[D] "       \
    "cos:f32[L,rot] sin:f32[L,rot] row_seq:i64[R]<@N row_pos:i64[R]<L "                         \
    "R H G D L rot eps:f; rot<=D L>=1 D>=1\n"                                                   \
    "attend_" #T "  >o:" #T "[R,H,D] q:" #T "[R,H,D] keys:" #T "[@N,L,G,D] "                    \
    "values:" #T "[@N,L,G,D] row_seq:i64[R]<@N row_limit:i64[R]<=L "                            \
    "R H G D L scale:f; H%G D>=1 L>=1\n"                                                        \
    "moe_ffn_" #T "  >y:" #T "[R,D] x:" #T "[R,D] weights:f32[R,k] experts:i32[R,k] "           \
    "gate_up:" #T "[E,{2*F,D}] down:" #T "[E,{D,F}] gate_up_bias?:" #T "[E,2*F] "               \
    "down_bias?:" #T "[E,D] R D F E k activation; E>=1 k>=1 D>=1 F>=1 activation<=3\n"          \
    "soft_embed_" #T "  >y:" #T "[R,E] x:" #T "[R,D] w:" #T "[{V,D}] bias?:" #T "[V] "          \
    "table:" #T "[Z,E] live:u8[R] weight:f32[R] R V D E Z; V>=1 D>=1 E>=1 Z>=V\n"               \
    "vocab_choice_" #T "  >token:i64[C]=V >confidence:f32[C] >margin:f32[C] >entropy:f32[C] "   \
    "x:" #T "[C,D] w:" #T "[{V,D}] bias?:" #T "[V] live:u8[C] temperature:f32[B] seed:i64[B] "  \
    "tick:i64[B] pos:i64[C] C B V D mask_id; B>=1 V>=1 D>=1 C%B\n"                             \
    "vocab_choice_asked_" #T "  >token:i64[C]=V >confidence:f32[C] >margin:f32[C] "             \
    ">entropy:f32[C] >score:f32[C] >asked_p:f32[C,S] >asked_score:f32[C,S] x:" #T "[C,D] "      \
    "w:" #T "[{V,D}] bias?:" #T "[V] live:u8[C] temperature:f32[B] seed:i64[B] tick:i64[B] "    \
    "pos:i64[C] asked:i64[C,S] C B V D mask_id S; B>=1 V>=1 D>=1 C%B\n"

DC_EXPORT const char dc_abi[] =
    DC_ABI_OF(f32) DC_ABI_OF(bf16) DC_ABI_OF(f16)
    "gather_rows  >out:?[C,Z]=x x:?[Z] index:i64[C]<x/Z C Z; Z>=1\n"
    "route  >weights:f32[R,k] >experts:i32[R,k]=E logits:f32[R,E] bias?:f32[E] R E k score "
    "groups kept renormalize scale:f; E>=1 k>=1 k<=E groups>=1 kept>=1 kept<=groups E%groups\n"
    "route_limited  >weights:f32[R,k] >experts:i32[R,k] logits:f32[R,E] bias?:f32[E] "
    "row_seq:i64[R] row_pos:i64[R] block_seq:i64[B] block_pos:i64[B,n] R B E k score "
    "groups kept renormalize scale:f capacity:f reroute pool n; "
    "E>=1 k>=1 k<=E groups>=1 kept>=1 kept<=groups E%groups n>=1\n";
