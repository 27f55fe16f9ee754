"""`dcompile run` and `dcompile calibrate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dcompile.cli.app import (
    ArtifactPath,
    Chat,
    GenLength,
    Quiet,
    SetParameter,
    Threads,
    app,
    telling,
)
from dcompile.cli.printed import Stream, print_numbered, shown, summary
from dcompile.cli.requests import default_gen_length, generate, parameters_of, prompts_of
from dcompile.errors import RequestError


@app.command()
def run(
    artifact: ArtifactPath,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT")] = None,
    prompt_ids: Annotated[str | None, typer.Option(metavar="1,2,3")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help='Lines {"prompt": ...} or {"prompt_ids": [...]}.'),
    ] = None,
    queue: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="As --prompts; each result as JSON at once, with its index."
        ),
    ] = None,
    gen_length: GenLength = None,
    threshold: Annotated[float | None, typer.Option()] = None,
    threshold_low: Annotated[float | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(help="Iterations a block.")] = None,
    set_parameter: SetParameter = None,
    early_stop: Annotated[
        bool,
        typer.Option("--early-stop/--no-early-stop", help="Stop after the block with an EOS."),
    ] = True,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    chat: Chat = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print each block when it is done.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Hash the files.")] = True,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where external weights were moved.")
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Generate from an artifact."""
    if sum(given is not None for given in (prompt, prompt_ids, prompts, queue)) != 1:
        raise typer.BadParameter("give one of --prompt, --prompt-ids, --prompts and --queue")
    if stream and queue is not None:
        raise typer.BadParameter("--queue prints whole results: leave --stream out")
    parameters = parameters_of(set_parameter or [])
    named = {"threshold": threshold, "threshold_low": threshold_low, "steps": steps}
    parameters |= {name: float(value) for name, value in named.items() if value is not None}
    asked = prompts_of(prompt, prompt_ids, prompts or queue)
    from dcompile.driver.missing_kernels import install
    from dcompile.runtime.decode.loop import Runner

    install()
    if not verify and not quiet:
        typer.echo("--no-verify: no file was compared with its hash", err=True)
    request: dict[str, Any] = {"temperature": temperature, "seed": seed, "early_stop": early_stop}
    with telling(quiet) as progress:
        progress("loading")
        runner = Runner.load(artifact, verify=verify, threads=threads, weights_at=weights)
        if queue is not None:
            request["on_result"] = print_numbered
        if not stream:
            progress("generating")
            results = generate(runner, asked, chat, gen_length, parameters, **request)
    if stream:
        file = sys.stderr if as_json else sys.stdout
        request["on_block"] = printer = Stream(runner, file, prompts is not None)
        results = generate(runner, asked, chat, gen_length, parameters, **request)
        printer.end()
    for result in () if queue is not None else results:
        if as_json:
            typer.echo(json.dumps(asdict(result), ensure_ascii=False))
        elif not stream:
            typer.echo(shown(result.text, result.tokens))
        if not as_json and not quiet:
            typer.echo(summary(result), err=True)


@app.command()
def calibrate(
    artifact: ArtifactPath,
    prompts: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="As for run.")],
    agreement: Annotated[
        float, typer.Option(help="Share of prompts to answer as the reference does.")
    ] = 0.99,
    gen_length: GenLength = None,
    chat: Chat = False,
    write: Annotated[
        bool, typer.Option("--record", help="Make the threshold the artifact's default.")
    ] = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Find the lowest threshold that agrees with an uncached decode of one token a forward."""
    from dcompile.decoding.calibrate import calibrate as calibrate_runner
    from dcompile.decoding.calibrate import record
    from dcompile.runtime.decode.loop import Runner

    asked = prompts_of(None, None, prompts)
    with telling(quiet) as progress:
        progress("decoding")
        runner = Runner.load(artifact, threads=threads)
        ids = [runner.encode(prompt, chat) for prompt in asked]
        length = gen_length or default_gen_length(runner, ids)
        found = calibrate_runner(runner, ids, gen_length=length, agreement=agreement)
    typer.echo(found.text())
    if found.chosen is None:
        what = f"no threshold agrees on {agreement:.1%} of the prompts: the cache loses the rest"
        raise RequestError(what, remedy="compile with --cache none, or ask for less --agreement")
    if write:
        record(artifact, {"threshold": found.chosen.threshold})
    if not quiet:
        done = f"recorded in {artifact}" if write else "for: dcompile run"
        typer.echo(f"{done}: --threshold {found.chosen.threshold:g}", err=True)
