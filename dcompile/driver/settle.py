"""Options settled: what the user left open is the family's, and contradictions are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dcompile.codegen.targets import Target, parse_target
from dcompile.decoding.rules import Combination, check_together
from dcompile.errors import OptionError
from dcompile.frontends.base import ModelSpec
from dcompile.ir.program import Program, StepShape
from dcompile.options import Options
from dcompile.policies import Policy, find_policy

DEFAULT_LENGTH = 2048
# What share of a block is decided when the next is added, and when it is fully activated (D2F).
PIPELINE = {"tau_add": 0.1, "tau_activate": 0.95}


@dataclass(frozen=True)
class Settled:
    """What a compile does: every name found, every number known.

    `options` is what was asked with these choices written in: for the record, and for what may be
    absent, such as limits of experts or a pass to stop after.
    """

    options: Options
    target: Target
    shape: StepShape  # slots, positions, block length, dtype
    combination: Combination  # policy, manager and cache, which go together
    parameters: Mapping[str, float]  # the policy's, as a request that says nothing has them

    @property
    def policy(self) -> Policy:
        return self.combination.policy


def settle(options: Options, spec: ModelSpec) -> Settled:
    """Fill what the user left open from the family's defaults; raises OptionError on contradiction."""
    block = _block_length(options, spec)
    length = _length(options, spec, block)
    # `auto`, as nothing, is the family's own policy, with the threshold that the family publishes.
    # On held-out questions of two small models no other was confirmed to lose nothing to it and take
    # fewer forwards (bench/results, 2026-11-25).
    name = options.policy
    name = spec.defaults.policy if name is None or name == "auto" else name
    policy = find_policy(name, options.score)
    dtype = spec.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    target = parse_target(options.target)
    shape = StepShape(
        slots=options.batch,
        positions=length,
        block_length=block,
        mask_id=spec.mask_id,
        dtype=dtype,
        shift=spec.shift,
        blocks=_blocks(options, length, block),
    )
    combination = Combination(
        policy,
        options.manager,
        options.cache or spec.defaults.cache,
        spec.block_length,
        options.smoothing is not None,
        options.aligned,
        options.cross_block,
        spec.shift,
    )
    # What a module's mask is, only the trace shows.
    if spec.layer_kinds:
        check_together(combination)
    written = options.changed(
        target=str(target),
        dtype=str(dtype).removeprefix("torch."),
        block_length=block,
        cache=combination.cache,
        max_length=length,
        policy=name,
    )
    return Settled(written, target, shape, combination, _parameters(policy, options, spec, block))


def check_traced(settled: Settled, program: Program) -> None:
    """Raise OptionError where the mask that the trace shows is not what the options are for."""
    span = program.shape.model_block
    if span is not None and span != settled.shape.block_length:
        raise OptionError(
            f"the model's blocks have {span} positions, not {settled.shape.block_length}",
            where="block_length",
            remedy=f"--block-length {span}",
        )
    check_together(replace(settled.combination, span=span))


def _block_length(options: Options, spec: ModelSpec) -> int:
    if options.manager == "canvas" and options.block_length is None:
        raise OptionError(
            "how many positions has the canvas?",
            where="manager",
            remedy="--block-length with the number of positions to generate",
        )
    if spec.block_length is None:
        return options.block_length or spec.defaults.block_length
    if options.block_length not in (None, spec.block_length):
        raise OptionError(
            f"the model's blocks have {spec.block_length} positions, not {options.block_length}",
            where="block_length",
            remedy=f"--block-length {spec.block_length}, or leave it out",
        )
    return spec.block_length


def _length(options: Options, spec: ModelSpec, block: int) -> int:
    length = options.max_length or min(spec.max_positions or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if spec.max_positions is not None and length > spec.max_positions:
        raise OptionError(
            f"the model has {spec.max_positions} positions, not {length}",
            where="max_length",
            remedy=f"--max-length {spec.max_positions}",
        )
    if block > length:
        raise OptionError(
            f"a block of {block} does not fit into {length} positions",
            remedy="a smaller --block-length",
        )
    return length


def _blocks(options: Options, length: int, block: int) -> int:
    """How many blocks of a sequence may be undecided at a time: in a pipeline, all where unsaid."""
    if options.manager != "pipelined":
        return 1
    return options.max_blocks or -(-length // block)


def _parameters(policy: Policy, options: Options, spec: ModelSpec, block: int) -> dict[str, float]:
    """The policy's defaults, as the family, the block and the manager change them."""
    parameters = {**policy.parameters, **spec.defaults.parameters(policy.name)}
    # Dream's number of steps is for its whole canvas.
    if "steps" in parameters and not (options.manager == "canvas" and policy.canvas):
        parameters["steps"] = float(block)
    if options.manager == "pipelined":
        parameters |= PIPELINE
    if options.smoothing is not None:
        parameters["smoothing"] = options.smoothing
    return parameters
