"""Decoding policies as plain traced torch functions, one a file."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from dcompile.errors import OptionError
from dcompile.policies.base import Asked, Choice, Decision, Policy, State, blame
from dcompile.policies.steps import steps

__all__ = ["Asked", "Choice", "Decision", "Policy", "State", "find_policy", "policy_names"]


def policy_names() -> tuple[str, ...]:
    """Every module of this package but `base` is a policy."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"))


def find_policy(name: str, score: str | None = None) -> Policy:
    """A policy by name, or a user's own as `path/to/file.py:name`; raises OptionError.

    `score` is by what `steps` orders positions; no other policy has one to choose.
    """
    if score is not None:
        if name != "steps":
            raise OptionError(
                f"policy {name!r} has its own score; --score {score} is for policy 'steps'",
                where="score",
                remedy="--policy steps, or leave --score out",
            )
        return steps(score)
    path, _, attribute = name.partition(":")
    if attribute:
        return _from_file(Path(path), attribute)
    if name not in policy_names():
        raise OptionError(
            f"there is no policy named {name!r}",
            remedy=f"one of {', '.join(policy_names())}, or your own as file.py:name",
        )
    policy = importlib.import_module(f"{__name__}.{name}").POLICY
    assert isinstance(policy, Policy)
    return policy


def _from_file(path: Path, attribute: str) -> Policy:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise OptionError(f"the policy's file {path} cannot be read", remedy="check the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise blame(attribute, (str(path), error.lineno or 1), error) from error
    except Exception as error:
        raise blame(attribute, (str(path), 1), error) from error
    found = vars(module).get(attribute)
    if isinstance(found, Policy):
        return found
    if callable(found):
        return Policy(attribute, found)
    raise OptionError(
        f"{path} has no policy named {attribute!r}",
        remedy="define a function (choice, parameters) -> bool [B, n] or Decision, or a Policy",
    )
