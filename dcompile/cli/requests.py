"""What the command line asks a runner for: prompts, parameters, lengths."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dcompile.errors import RequestError

if TYPE_CHECKING:
    from dcompile.runtime.decode.loop import Runner
    from dcompile.runtime.decode.sequence import Result

_DEFAULT_LENGTH = 128
Prompt = str | list[int]


def prompts_of(prompt: str | None, prompt_ids: str | None, file: Path | None) -> list[Prompt]:
    if prompt is not None:
        return [prompt]
    if prompt_ids is not None:
        try:
            return [[int(part) for part in prompt_ids.split(",") if part.strip()]]
        except ValueError as error:
            raise typer.BadParameter("--prompt-ids takes numbers: 1,2,3") from error
    assert file is not None
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"the prompts cannot be read: {error}", where=str(file)) from error
    # Of what ends a line elsewhere, JSON's texts may hold everything but this one.
    lines = data.removeprefix(BOM_UTF8).split(b"\n")
    return [
        _prompt_of(line, f"{file}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _prompt_of(line: bytes, where: str) -> Prompt:
    remedy = 'write {"prompt": "text"} or {"prompt_ids": [1, 2, 3]}'
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        what = f"the line is not UTF-8: {error}"
        raise RequestError(what, where=where, remedy="write the file in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RequestError("the line is not JSON", where=where, remedy=remedy) from error
    match item:
        case {"prompt": str(text)} if "prompt_ids" not in item:
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                what = "the prompt is no text: code points of it are no characters"
                raise RequestError(what, where=where, remedy="write whole characters")
            return text
        case {"prompt_ids": list(ids)} if "prompt" not in item:
            return ids
    raise RequestError("the line has no prompt, or more than one", where=where, remedy=remedy)


def parameters_of(
    assignments: Sequence[str], named: Mapping[str, float | None]
) -> dict[str, float]:
    """Parameters of the policy, as `--set` and the options that are named after them give them."""
    parameters = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            parameters[name.strip().replace("-", "_")] = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"--set takes NAME=NUMBER, not {assignment!r}") from error
    return parameters | {name: float(v) for name, v in named.items() if v is not None}


def load(
    artifact: Path, verify: bool, threads: int | None, weights: Path | None, quiet: bool
) -> Runner:
    """The artifact's runner, which says so where files are not compared with their hashes."""
    from dcompile.driver.missing_kernels import install
    from dcompile.runtime.decode.loop import Runner

    install()
    if not verify and not quiet:
        typer.echo("--no-verify: no file was compared with its hash", err=True)
    return Runner.load(artifact, verify=verify, threads=threads, weights_at=weights)


def generate(
    runner: Runner,
    prompts: Sequence[Prompt],
    chat: bool,
    gen_length: int | None,
    parameters: dict[str, float],
    **request: Any,
) -> list[Result]:
    # Checked here, where they are apart from what else a request has: no `--set seed=4`.
    runner.limits.parameters_of(parameters)
    ids = [runner.encode(prompt, chat) for prompt in prompts]
    length = default_gen_length(runner, ids) if gen_length is None else gen_length
    return runner.generate(ids, gen_length=length, **{**request, **parameters})


def default_gen_length(runner: Runner, ids: Sequence[list[int]]) -> int:
    return runner.limits.default_length(max(map(len, ids), default=0), _DEFAULT_LENGTH)
