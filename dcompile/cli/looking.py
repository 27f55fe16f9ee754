"""Commands that look at an artifact: `info`, `explain`, `profile`, `verify`, `bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dcompile.cli.app import (
    LOOK,
    ArtifactPath,
    AsJson,
    GenLength,
    Prompt,
    PromptIds,
    Prompts,
    Quiet,
    SetParameter,
    Threads,
    app,
    telling,
)
from dcompile.cli.requests import parameters_of, prompts_of


@app.command(rich_help_panel=LOOK)
def info(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An artifact, or a checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Show what an artifact or a checkpoint is: model, decoding, target, sizes."""
    from dcompile.explain.facts import facts_of
    from dcompile.explain.info import in_words

    facts = facts_of(model)
    typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else in_words(facts), nl=as_json)


@app.command(rich_help_panel=LOOK)
def explain(
    artifact: ArtifactPath,
    pass_name: Annotated[
        str | None,
        typer.Argument(
            metavar="[PASS]",
            help="Show what this pass changed.",
            show_default="all passes, counted",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--remarks",
            metavar="missed|passed|all",
            help="Say what the passes could not do, what they did, or both.",
        ),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.svg", help="Draw the program, after PASS or at the end; or FILE.dot."
        ),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT", help="Run the passes again on the checkpoint, and time them."
        ),
    ] = None,
) -> None:
    """Show the passes and kernels of an artifact, or what one pass changed."""
    from dcompile.explain.command import explain as explain_artifact
    from dcompile.explain.command import remarks, show

    if graph is not None:
        from dcompile.explain.command import stage_after
        from dcompile.explain.graph import draw
        from dcompile.runtime.artifact import open_artifact

        draw(stage_after(open_artifact(artifact, verify=False), pass_name), graph)
    elif kind is not None:
        typer.echo(remarks(artifact, kind, pass_name), nl=False)
    elif times is not None:
        from dcompile.explain.times import pass_times

        typer.echo(pass_times(artifact, times), nl=False)
    else:
        show(explain_artifact(artifact, pass_name))


@app.command(rich_help_panel=LOOK)
def profile(
    artifact: ArtifactPath,
    prompt: Prompt = None,
    prompt_ids: PromptIds = None,
    prompts: Prompts = None,
    gen_length: GenLength = None,
    set_parameter: SetParameter = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Generations without timers, and as many with them.")
    ] = 3,
    launches: Annotated[
        bool, typer.Option("--launches", help="Print a line for every launch.")
    ] = False,
    as_json: AsJson = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write trace events, for ui.perfetto.dev.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that stands alone.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="Show it beside another artifact, or a profile's JSON."),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Generate, and show where time and memory went, launch by launch.

    Without a prompt, from random tokens; always to the end of the generated length.
    """
    given = sum(each is not None for each in (prompt, prompt_ids, prompts))
    if given > 1:
        raise typer.BadParameter("give one of --prompt, --prompt-ids and --prompts")
    asked = prompts_of(prompt, prompt_ids, prompts) if given else []
    parameters = parameters_of(set_parameter or [], {})
    from dcompile.profile.command import Asked, run_profile

    with telling(quiet) as progress:
        wanted = Asked(asked, gen_length, parameters, rounds, threads, progress)
        shown = run_profile(artifact, wanted, compare_with=compare)
        shown.write(trace, html)
    shown.print(as_json, launches)


@app.command(rich_help_panel=LOOK)
def verify(
    artifact: ArtifactPath,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The checkpoint that it came from.")
    ],
    run_model: Annotated[
        bool,
        typer.Option(
            "--run/--no-run", help="Run the program after each pass, and each layer, as well."
        ),
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Compare an artifact with its checkpoint: each pass, each stored value, each layer."""
    from dcompile.verify.command import verify as verify_artifact

    with telling(quiet) as progress:
        progress("loading")
        report = verify_artifact(artifact, checkpoint, run_model=run_model, progress=progress)
    typer.echo(report.rstrip("\n"))


@app.command(rich_help_panel=LOOK)
def bench(
    artifact: ArtifactPath,
    against: Annotated[
        str,
        typer.Option(
            metavar="eager,compile",
            help="What to time beside it: the checkpoint as it is, or under torch.compile.",
            show_default="nothing",
        ),
    ] = "",
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="The checkpoint that --against needs."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Positions in the sequence.", show_default="the artifact's --max-length"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 15,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time one forward of an artifact, beside its rivals and the machine's floor."""
    from dcompile.bench.command import bench as bench_artifact

    rivals = [name.strip() for name in against.split(",") if name.strip()]
    with telling(quiet) as progress:
        progress("measuring")
        table = bench_artifact(
            artifact, rivals, checkpoint, context=context, rounds=rounds, threads=threads
        )
    typer.echo(json.dumps(table.json()) if as_json else table.text(), nl=as_json)
