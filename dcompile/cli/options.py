"""Compile-time options on the command line, from the fields of `Options` alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from dcompile.options import Options

PANELS = ("Model", "Decoding", "Cache", "Experts", "Machine", "Debugging")
"""The groups that help shows options in, in its order."""


def takes_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `Options` (or those named).

    The function takes `options`, which holds what was given and the defaults of the rest.
    """
    kinds = get_type_hints(Options)
    # The order of the fields is the manifest's; help has that of its panels.
    listed = sorted(fields(Options), key=lambda f: PANELS.index(f.metadata["panel"]))
    asked = {f.name: _parameter(f, kinds[f.name]) for f in listed if f.name in names or not names}

    def give(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            chosen: dict[str, Any] = {name: given.pop(name) for name in asked}
            for name, value in chosen.items():
                if isinstance(value, list):
                    chosen[name] = tuple(value) or Options.__dataclass_fields__[name].default
            options = Options(**chosen)
            command(**given, options=options)

        own = inspect.signature(command, eval_str=True).parameters
        taken = [p for p in own.values() if p.name != "options"]
        run.__signature__ = inspect.Signature([*taken, *asked.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*taken, *asked.values())}
        del run.__wrapped__
        return run

    return give


def _parameter(of: Field[Any], kind: Any) -> inspect.Parameter:
    given = next((part for part in get_args(kind) if get_origin(part) is tuple), kind)
    several = get_origin(given) is tuple
    told = of.metadata
    spelled = typer.Option(
        *([told["flag"]] if told["flag"] else []),
        help=told["help"],
        metavar=told["metavar"],
        show_default=told["unset"] or True,
        rich_help_panel=told["panel"],
    )
    return inspect.Parameter(
        of.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=[] if several else of.default,
        annotation=Annotated[list[get_args(given)[0]] if several else kind, spelled],  # type: ignore[misc]
    )
