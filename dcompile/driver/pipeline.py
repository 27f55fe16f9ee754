"""The passes in order, and the loop that runs them."""

from __future__ import annotations

import re
from typing import Protocol

from dcompile.errors import OptionError
from dcompile.ir.contract import verify
from dcompile.ir.edit import drop_unused_inputs
from dcompile.ir.program import Pass, Program
from dcompile.options import Options
from dcompile.passes.canonicalize import Canonicalize
from dcompile.passes.find_roles import FindRoles
from dcompile.passes.fold_constants import FoldConstants
from dcompile.passes.fuse_add_rms_norm import FuseAddRMSNorm
from dcompile.passes.fuse_moe import FuseMoE
from dcompile.passes.fuse_norm_rope_write import FuseNormRopeWrite
from dcompile.passes.fuse_silu_mul import FuseSiluMul
from dcompile.passes.fuse_soft_embed import FuseSoftEmbed
from dcompile.passes.fuse_vocab_choice import FuseVocabChoice
from dcompile.passes.limit_experts import LimitExperts
from dcompile.passes.merge_projections import MergeProjections
from dcompile.passes.narrow_window import NarrowWindow
from dcompile.passes.reuse_kv import ReuseKV


def passes(options: Options) -> tuple[Pass, ...]:
    """The order; `run` brings the program into canonical form again after each."""
    return (
        Canonicalize(),
        # As written: a mixture's dispatch may look like mixing positions, and is none.
        FuseMoE(),
        FoldConstants(),
        ReuseKV(),
        # After the proof that no position sees another: limits let a sequence's rows see each other.
        *_limits(options),
        # Roles before the fusions that hide what a linear layer feeds.
        FindRoles(),
        MergeProjections(),
        FuseSiluMul(),
        FuseNormRopeWrite(),
        FuseAddRMSNorm(),
        # Before the narrowing, which takes the logits away from the rows that choose nothing.
        *([FuseSoftEmbed()] if options.smoothing is not None else []),
        # After the fusions: what is narrowed are whole kernels.
        NarrowWindow(),
        FuseVocabChoice(),
    )


def _limits(options: Options) -> tuple[Pass, ...]:
    if options.moe_capacity is None and options.expert_pool is None:
        return ()
    return (
        LimitExperts(options.moe_capacity, options.moe_overflow or "drop", options.expert_pool),
    )


def name_of(item: Pass) -> str:
    """FuseMoE -> fuse_moe, ReuseKV -> reuse_kv"""
    name = type(item).__name__
    for whole, short in (("RMSNorm", "RmsNorm"), ("MoE", "Moe"), ("KV", "Kv")):
        name = name.replace(whole, short)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Observer(Protocol):
    """Is told of every pass that runs: what records, compares or reports a compile."""

    def before(self, program: Program, item: Pass) -> None: ...

    def after(self, program: Program, item: Pass, changed: int) -> None: ...


def run(program: Program, options: Options, *observers: Observer) -> None:
    """Run the passes; after each that changed something tidy up, after each verify and tell."""
    order = passes(options)
    _known(options, {name_of(p) for p in order})
    verify(program, "trace")
    for item in order:
        name = name_of(item)
        if name in options.skip:
            continue
        for observer in observers:
            observer.before(program, item)
        changed = item(program)
        if changed:
            tidy(program)
        verify(program, name)
        for observer in observers:
            observer.after(program, item, changed)
        if name == options.stop_after:
            break


def tidy(program: Program) -> None:
    """Canonical form, and nothing that nobody reads."""
    Canonicalize()(program)
    clean_up(program)


def clean_up(program: Program) -> None:
    """Drop what nothing reads."""
    for node in reversed(program.nodes()):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
    drop_unused_inputs(program)


def _known(options: Options, names: set[str]) -> None:
    if name_of(Canonicalize()) in options.skip:
        raise OptionError(
            "canonicalize cannot be left out: every pass reads canonical form",
            remedy="--stop-after canonicalize, or --skip the pass that departs",
        )
    for name in (*options.skip, *([options.stop_after] if options.stop_after else [])):
        if name not in names:
            raise OptionError(
                f"there is no pass named {name!r}", remedy=f"one of {', '.join(sorted(names))}"
            )
