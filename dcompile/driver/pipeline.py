"""The passes in order, and the loop that runs, checks and records them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import Node

from dcompile.errors import OptionError
from dcompile.ir.contract import verify
from dcompile.ir.edit import drop_unused_inputs
from dcompile.ir.meta import facts
from dcompile.ir.program import Pass, Program
from dcompile.ir.remarks import Remark
from dcompile.ir.show import show, target_name
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

log = logging.getLogger(__name__)


def passes(options: Options) -> tuple[Pass, ...]:
    """The order. A pass stands twice where another leaves work for it."""
    return (
        Canonicalize(),
        # As written: a mixture's dispatch may look like mixing positions, and is none.
        FuseMoE(),
        FoldConstants(),
        Canonicalize(),
        ReuseKV(),
        Canonicalize(),
        # After the proof that no position sees another: limits let a sequence's rows see each other.
        *_limits(options),
        # Roles before the fusions that hide what a linear layer feeds.
        FindRoles(),
        MergeProjections(),
        FuseSiluMul(),
        Canonicalize(),
        FuseNormRopeWrite(),
        Canonicalize(),
        FuseAddRMSNorm(),
        # Before the narrowing, which takes the logits away from the rows that choose nothing.
        *([FuseSoftEmbed()] if options.smoothing is not None else []),
        # After the fusions: what is narrowed are whole kernels.
        NarrowWindow(),
        Canonicalize(),
        FuseVocabChoice(),
        Canonicalize(),
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


@dataclass(frozen=True)
class Record:
    """What one pass did."""

    name: str
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float
    text: str  # the program after it


Check = Callable[[Program, Pass | None], None]


def run(
    program: Program,
    options: Options,
    check: Check | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Record]:
    """Run the passes; after each that changed something: clean up, verify, record.

    `check(program, pass)` is called before the first pass (with None) and after each.
    """
    order = passes(options)
    _known(options, {name_of(p) for p in order})
    verify(program, "trace")
    if check is not None:
        check(program, None)
    records: list[Record] = []
    for item in order:
        name = name_of(item)
        if name in options.skip:
            continue
        if progress is not None:
            progress(name)
        known = set(program.nodes())
        before, start = len(known), time.perf_counter()
        changed = item(program)
        clean_up(program)
        seconds = time.perf_counter() - start
        verify(program, name)
        log.info("%s: %d places, %d -> %d nodes", name, changed, before, len(program.graph.nodes))
        if changed:
            program.remarks += made(program, name, known)
            text = show(program)
            records.append(Record(name, changed, before, len(program.graph.nodes), seconds, text))
            if check is not None:
                check(program, item)
        if name == options.stop_after:
            break
    return records


def made(program: Program, name: str, known: set[Node]) -> Iterator[Remark]:
    """What a pass put in place of other nodes: fused operators, and products."""
    for node in program.nodes():
        if node in known or node.op != "call_function":
            continue
        target = target_name(node)
        if target.startswith("dcompile.") or target == "linear.default":
            where = facts(node).origin or node.name
            what = target.removeprefix("dcompile.").removesuffix(".default")
            yield Remark(name, where, f"made {what} ({node.name})", "passed")


def clean_up(program: Program) -> None:
    """Drop what nothing reads."""
    for node in reversed(program.nodes()):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
    drop_unused_inputs(program)


def _known(options: Options, names: set[str]) -> None:
    for name in (*options.skip, *([options.stop_after] if options.stop_after else [])):
        if name not in names:
            raise OptionError(
                f"there is no pass named {name!r}", remedy=f"one of {', '.join(sorted(names))}"
            )
