"""A policy asked for its decision: what it raises and what it returns are held against it by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcompile.errors import DcompileError, PolicyError
from dcompile.ir.sizes import is_static
from dcompile.policies.base import Choice, Decision, Policy, blame

RETURNS = "return bool [B, n], or Decision(commit, ...); docs/decoding.md has what each field is"


def decide(policy: Policy, choice: Choice, parameters: Mapping[str, Tensor]) -> Decision:
    """What the policy wants, of the shapes and dtypes that `Decision` promises; raises PolicyError."""
    wanted = _call(policy, policy.commit, choice, parameters)
    decision = Decision(wanted) if isinstance(wanted, Tensor) else wanted
    if not isinstance(decision, Decision):
        raise _departs(policy, f"returns a {type(decision).__name__}, no tensor and no Decision")
    row = choice.candidate.shape
    _hold(policy, "commit", decision.commit, row, torch.bool)
    if decision.token is not None:
        _hold(policy, "token", decision.token, row, torch.int64)
    if decision.reopen is not None:
        _hold(policy, "reopen", decision.reopen, row, torch.bool)
    if decision.more is not None:
        _hold(policy, "more", decision.more, row[:1], torch.bool)
    if set(decision.state) != set(policy.state):
        what = f"returns the state {sorted(decision.state)}, but declares {sorted(policy.state)}"
        raise _departs(policy, what, "return Decision(..., state={...}) with each declared name")
    for name, held in policy.state.items():
        size = (*row[:1], *held.shape(int(row[1])))
        _hold(policy, f"state {name!r}", decision.state[name], size, held.dtype)
    return decision


def asked_tokens(
    policy: Policy,
    asks: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    current: Tensor,
    state: Mapping[str, Tensor],
) -> Tensor:
    """The tokens that the policy wants to be told about, [B, n, S]; raises PolicyError."""
    tokens: Tensor = _call(policy, asks, current, state)
    return tokens


def fixes_batch(policy: Policy) -> PolicyError:
    """The error of a policy that works for one number of sequences only, as the trace found."""
    return _departs(
        policy, "fixes how many sequences it decides for", "take B from choice.candidate"
    )


def _call(policy: Policy, function: Callable[..., Any], *arguments: object) -> Any:
    try:
        return function(*arguments)
    except DcompileError:
        raise
    except Exception as error:
        raise blame(policy.name, _definition(function), error) from error


def _hold(
    policy: Policy,
    field: str,
    made: object,
    shape: Sequence[int | torch.SymInt],
    dtype: torch.dtype,
) -> None:
    wanted = f"{_name(dtype)} {_sizes(shape)}"
    if not isinstance(made, Tensor):
        raise _departs(policy, f"returns {field} as a {type(made).__name__}, not {wanted}")
    same = len(made.shape) == len(shape) and all(map(_agree, made.shape, shape))
    if not same or made.dtype is not dtype:
        got = f"{_name(made.dtype)} {_sizes(made.shape)}"
        raise _departs(policy, f"returns {field} as {got}, not {wanted}")


def _agree(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Two sizes that are both of the batch are the same one, which the trace may not know yet."""
    if is_static(a) and is_static(b):
        return int(a) == int(b)
    return not is_static(a) and not is_static(b)


def _departs(policy: Policy, what: str, remedy: str = RETURNS) -> PolicyError:
    file, line = _definition(policy.commit)
    return PolicyError(f"policy {policy.name!r} {what}", where=f"{file}:{line}", remedy=remedy)


def _definition(function: Callable[..., object]) -> tuple[str, int]:
    """Where a function, or what a wrapper of one wraps, is written."""
    plain = inspect.unwrap(getattr(function, "func", function))
    code = getattr(plain, "__code__", None) or getattr(type(plain).__call__, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else (type(plain).__module__, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: Sequence[int | torch.SymInt]) -> str:
    """[B, 8]: what is not static is the batch."""
    return f"[{', '.join(str(int(d)) if is_static(d) else 'B' for d in shape)}]"
