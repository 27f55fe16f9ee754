"""Options settled: what the user left open is the family's, and contradictions are refused."""

from __future__ import annotations

from typing import TypeVar

from dcompile.codegen.targets import parse_target
from dcompile.decoding.rules import Combination, check_together
from dcompile.errors import OptionError
from dcompile.frontends.base import ModelSpec
from dcompile.ir.program import Program
from dcompile.options import Options
from dcompile.policies import find_policy

Chosen = TypeVar("Chosen", bound=Options)
DEFAULT_LENGTH = 2048


def settle(options: Chosen, spec: ModelSpec) -> Chosen:
    """Fill what the user left open from the family's defaults; raises OptionError on contradiction."""
    given = spec.defaults
    block = options.block_length or int(given.get("block_length", 32))  # type: ignore[call-overload]
    cache = options.cache or str(given.get("cache", "none"))
    if spec.block_length is not None:
        if options.block_length not in (None, spec.block_length):
            raise OptionError(
                f"the model's blocks have {spec.block_length} positions, not {options.block_length}",
                remedy=f"--block-length {spec.block_length}, or leave it out",
            )
        block = spec.block_length
    length = options.max_length or min(spec.max_positions or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if spec.max_positions is not None and length > spec.max_positions:
        raise OptionError(
            f"the model has {spec.max_positions} positions, not {length}",
            remedy=f"--max-length {spec.max_positions}",
        )
    if block > length:
        raise OptionError(
            f"a block of {block} does not fit into {length} positions",
            remedy="a smaller --block-length",
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = str(spec.dtype).removeprefix("torch.")
    if options.manager == "canvas" and options.block_length is None:
        raise OptionError(
            "how many positions has the canvas?",
            where="--manager canvas",
            remedy="--block-length with the number of positions to generate",
        )
    settled = options.changed(
        target=str(parse_target(options.target)),
        dtype=dtype,
        block_length=block,
        cache=cache,
        max_length=length,
        policy=_policy(options.policy, spec),
    )
    # What a module's mask is, only the trace shows.
    if spec.layer_kinds:
        check_together(combination(settled, spec.block_length, spec.shift))
    return settled


def _policy(wanted: str | None, spec: ModelSpec) -> str:
    """`auto`, as nothing, is the family's own policy, with the threshold that the family publishes.

    On held-out questions of two small models no other was confirmed to lose nothing to it and take
    fewer forwards (bench/results, 2026-11-25).
    """
    own = str(spec.defaults.get("policy", "threshold"))
    return own if wanted in (None, "auto") else wanted


def check_block(program: Program, options: Options) -> None:
    block = program.shape.model_block
    if block is not None and block != options.block_length:
        raise OptionError(
            f"the model's blocks have {block} positions, not {options.block_length}",
            remedy=f"--block-length {block}",
        )


def combination(options: Options, span: int | None, shift: bool) -> Combination:
    assert options.policy is not None and options.cache is not None
    return Combination(
        find_policy(options.policy, options.score),
        options.manager,
        options.cache,
        span,
        options.smoothing is not None,
        options.aligned,
        options.cross_block,
        shift,
    )
