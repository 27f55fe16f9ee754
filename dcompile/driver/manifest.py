"""What an artifact says of itself."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from dcompile.driver.origin import Origin
from dcompile.frontends.base import ModelSpec
from dcompile.ir.program import Program
from dcompile.options import Options
from dcompile.policies import Policy, find_policy

# What share of a block is decided when the next is added, and when it is fully activated (D2F).
PIPELINE = {"tau_add": 0.1, "tau_activate": 0.95}


def manifest_of(origin: Origin, options: Options, program: Program) -> dict[str, Any]:
    return {
        "dcompile": version("dcompile"),
        "checkpoint": origin.digest,
        **manifest_facts(origin, options, program),
        "options": options.record(),
    }


def manifest_facts(origin: Origin, options: Options, program: Program) -> dict[str, dict[str, Any]]:
    """What an artifact's manifest says of its model and its policy."""
    spec = origin.spec
    assert options.policy is not None
    policy = find_policy(options.policy, options.score)
    vocab = spec.vocab_size or _vocabulary(program)
    return {
        "model": {
            "family": spec.family,
            "vocab_size": vocab,
            "mask_id": spec.mask_id,
            "eos_ids": list(spec.eos_ids),
            "shift": spec.shift,
            "block_length": program.shape.model_block,
            "dtype": options.dtype,
            "max_positions": spec.max_positions,
        },
        "policy": {
            "name": policy.name,
            "parameters": _parameters(policy, options, spec),
            "state": [{"name": n, "reset": s.reset} for n, s in policy.state.items()],
        },
    }


def _parameters(policy: Policy, options: Options, spec: ModelSpec) -> dict[str, float]:
    """The policy's defaults; the family's threshold is for the policy that the family names."""
    parameters = dict(policy.parameters)
    threshold = spec.defaults.get("threshold")
    # The reports of block-diffusion models tune theirs for `dynamic` as well.
    tuned = {spec.defaults.get("policy"), *(["dynamic"] if spec.block_length is not None else [])}
    if threshold is not None and policy.name in tuned:
        parameters["threshold"] = float(threshold)  # type: ignore[arg-type]
    # Dream's number of steps is for its whole canvas.
    blocks = options.manager != "canvas" or not policy.canvas
    if "steps" in parameters and blocks and options.block_length is not None:
        parameters["steps"] = float(options.block_length)
    if options.manager == "pipelined":
        parameters |= PIPELINE
    if options.smoothing is not None:
        parameters["smoothing"] = options.smoothing
    return parameters


def _vocabulary(program: Program) -> int:
    """Rows of the embedding or of the vocabulary projection, for a module that does not say."""
    from dcompile.ir import operators
    from dcompile.ir.edit import value

    for node in program.calls(operators.VOCAB_CHOICE, operators.VOCAB_CHOICE_ASKED):
        return int(value(node.args[1]).shape[0])  # type: ignore[arg-type]
    for node in program.calls(operators.CHOOSE, operators.CHOOSE_ASKED):
        return int(value(node.args[0]).shape[-1])  # type: ignore[arg-type]
    raise AssertionError("a step chooses tokens")
