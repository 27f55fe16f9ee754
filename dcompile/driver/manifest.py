"""What an artifact says of itself."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from dcompile.driver.origin import Origin
from dcompile.driver.settle import Settled
from dcompile.ir.program import Program


def manifest_of(origin: Origin, settled: Settled, program: Program) -> dict[str, Any]:
    return {
        "dcompile": version("dcompile"),
        "checkpoint": origin.digest,
        **manifest_facts(origin, settled, program),
        "options": settled.options.record(),
    }


def manifest_facts(origin: Origin, settled: Settled, program: Program) -> dict[str, dict[str, Any]]:
    """What an artifact's manifest says of its model and its policy."""
    spec, policy = origin.spec, settled.policy
    return {
        "model": {
            "family": spec.family,
            "vocab_size": vocabulary(origin, program),
            "mask_id": spec.mask_id,
            "eos_ids": list(spec.eos_ids),
            "shift": spec.shift,
            "block_length": program.shape.model_block,
            "dtype": settled.options.dtype,
            "max_positions": spec.max_positions,
        },
        "policy": {
            "name": policy.name,
            "parameters": settled.parameters,
            "state": [{"name": n, "reset": s.reset} for n, s in policy.state.items()],
        },
    }


def vocabulary(origin: Origin, program: Program) -> int:
    """Rows of the vocabulary projection; a module does not say, its trace shows them."""
    if origin.spec.vocab_size:
        return origin.spec.vocab_size
    from dcompile.ir import operators
    from dcompile.ir.edit import value

    for node in program.calls(operators.VOCAB_CHOICE, operators.VOCAB_CHOICE_ASKED):
        return int(value(node.args[1]).shape[0])
    for node in program.calls(operators.CHOOSE, operators.CHOOSE_ASKED):
        return int(value(node.args[0]).shape[-1])
    raise AssertionError("a step chooses tokens")
