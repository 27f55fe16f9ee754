"""Commands that run an artifact: `run`, `chat`, `calibrate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dcompile.cli.app import (
    USE,
    ArtifactPath,
    Chat,
    GenLength,
    Prompt,
    PromptIds,
    Prompts,
    Quiet,
    Seed,
    SetParameter,
    Temperature,
    Threads,
    Verify,
    WeightsAt,
    app,
    telling,
)
from dcompile.cli.printed import Stream, print_numbered, shown, summary
from dcompile.cli.requests import (
    default_gen_length,
    generate,
    load,
    parameters_of,
    prompts_of,
)
from dcompile.errors import RequestError

Threshold = Annotated[
    float | None,
    typer.Option(
        help="How sure the model must be of a token for it to be kept, above 0 to 1.",
        show_default="as compiled",
    ),
]


@app.command(rich_help_panel=USE)
def run(
    artifact: ArtifactPath,
    prompt: Prompt = None,
    prompt_ids: PromptIds = None,
    prompts: Prompts = None,
    queue: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="As --prompts, but each result is printed when it is there: as JSON, with the "
            "index of its prompt.",
        ),
    ] = None,
    gen_length: GenLength = None,
    threshold: Threshold = None,
    threshold_low: Annotated[
        float | None,
        typer.Option(
            help="With policy hierarchical: how sure it must be of the best token of a run of masks.",
            show_default="as compiled",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="With policies that count them: forwards that a block takes.",
            show_default="as compiled",
        ),
    ] = None,
    set_parameter: SetParameter = None,
    early_stop: Annotated[
        bool,
        typer.Option(
            "--early-stop/--no-early-stop", help="Stop after the block in which the text ends."
        ),
    ] = True,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    chat: Chat = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print each block as soon as it is decided.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each prompt.")
    ] = False,
    verify: Verify = True,
    weights: WeightsAt = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Generate from a prompt, or from many."""
    if sum(given is not None for given in (prompt, prompt_ids, prompts, queue)) != 1:
        raise typer.BadParameter("give one of --prompt, --prompt-ids, --prompts and --queue")
    if stream and queue is not None:
        raise typer.BadParameter("--queue prints whole results: leave --stream out")
    named = {"threshold": threshold, "threshold_low": threshold_low, "steps": steps}
    parameters = parameters_of(set_parameter or [], named)
    asked = prompts_of(prompt, prompt_ids, prompts or queue)
    request: dict[str, Any] = {"temperature": temperature, "seed": seed, "early_stop": early_stop}
    with telling(quiet) as progress:
        progress("loading")
        runner = load(artifact, verify, threads, weights, quiet)
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


@app.command(rich_help_panel=USE)
def chat(
    artifact: ArtifactPath,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the model is told before the conversation begins."),
    ] = None,
    gen_length: GenLength = None,
    threshold: Threshold = None,
    set_parameter: SetParameter = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    verify: Verify = True,
    weights: WeightsAt = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Talk with the model: a line is a turn, /clear begins again, Ctrl-D ends."""
    from dcompile.cli.conversation import Conversation, talk

    parameters = parameters_of(set_parameter or [], {"threshold": threshold})
    with telling(quiet) as progress:
        progress("loading")
        runner = load(artifact, verify, threads, weights, quiet)
    request = {"temperature": temperature, "seed": seed, **parameters}
    talk(Conversation(runner, system, gen_length, request), quiet)


@app.command(rich_help_panel=USE)
def calibrate(
    artifact: ArtifactPath,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help='Prompts to try it on: a line each, {"prompt": "text"} or {"prompt_ids": [1, 2]}.',
        ),
    ],
    agreement: Annotated[
        float,
        typer.Option(help="Share of the prompts that must be answered as the reference does."),
    ] = 0.99,
    gen_length: GenLength = None,
    chat: Chat = False,
    write: Annotated[
        bool, typer.Option("--record", help="Make the threshold the artifact's default.")
    ] = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Find the lowest threshold that answers as an uncached decode of one token a forward does."""
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
