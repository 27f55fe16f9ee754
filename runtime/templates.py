"""Chat templates, rendered as the library that they are written for renders them.

The environment is that of `transformers`, with its options, filters and globals: a sandbox, in which
a template sees plain values alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dcompile.errors import RequestError

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a turn's reasoning is given; templates read the first, a few the second."""


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **values: Any,
) -> str:
    """The template's text for a conversation; raises RequestError where it fails or refuses."""
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        remedy = 'give a list of {"role": ..., "content": ...}'
        raise RequestError("a conversation is a list of messages", remedy=remedy)
    # Templates handle a missing key, and print a null.
    told = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        return _compiled(source).render(
            messages=[_with_reasoning(_plain(message)) for message in told],
            tools=_plain(tools),
            documents=_plain(documents),
            **_plain(values),
        )
    except RequestError:
        raise
    except Exception as error:  # the template is somebody else's program
        raise RequestError(f"the chat template failed: {error}") from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}` around what the model itself says: of use in training, plain text here."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 has it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    @staticmethod
    def _said(caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=1)` is one too
        self, *given = args
        told = dict(*given, **kwargs)
        for name in told:
            _check_name(name)
        Namespace.__init__(self, told)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no names with an underscore first, such as {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _refuse(message: str) -> None:
    raise RequestError(f"the chat template refuses: {message}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    told = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if told is None:
        return message
    return {"thinking": told, **message, "reasoning_content": told}


def _plain(value: Any) -> Any:
    """Values of JSON alone: others have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"
