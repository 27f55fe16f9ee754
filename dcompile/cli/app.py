"""The application that commands register with, and what several of them take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """Compile a diffusion language model, and run what comes out.

\b
dcompile LLaDA-8B-Instruct -o llada.dcx
dcompile run llada.dcx --chat -p "Why is the sky blue?" -n 128
dcompile chat llada.dcx
"""
# Panels of the commands in `dcompile --help`.
MAKE, USE, LOOK = "Compile", "Run", "Look inside"

app = typer.Typer(
    name="dcompile",
    help=EXAMPLES,
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ArtifactPath = Annotated[
    Path, typer.Argument(metavar="MODEL.dcx", help="An artifact, as dcompile writes it.")
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt, as text.")
]
PromptIds = Annotated[str | None, typer.Option(metavar="1,2,3", help="The prompt, as token ids.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help='Many prompts: a line each, {"prompt": "text"} or {"prompt_ids": [1, 2]}.',
    ),
]
GenLength = Annotated[
    int | None,
    typer.Option(
        "--gen-length",
        "-n",
        help="How many tokens to generate.",
        show_default="128, or what the artifact has room for",
    ),
]
SetParameter = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any parameter of the compiled policy, for all of which see dcompile info; may be "
        "given several times.",
        show_default="as compiled",
    ),
]
Temperature = Annotated[
    float, typer.Option(help="Randomness of the tokens: 0 takes the likeliest, 1 samples.")
]
Seed = Annotated[
    int, typer.Option(help="Number that the random choices follow from, with a temperature.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads.", show_default="as compiled, else every core; 1 for a small model"
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare the files with their hashes first.")
]
WeightsAt = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FOLDER",
        help="Where weights outside of the artifact were moved to.",
        show_default="beside the artifact",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")]


@contextmanager
def telling(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is going on, to a person only."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)
