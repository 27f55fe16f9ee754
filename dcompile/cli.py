"""The command line: `dcompile CHECKPOINT` compiles, the subcommands do the rest.

Each command imports what it needs when it runs: `--help` loads no torch, `run` no compiler.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from dcompile.errors import DcompileError, RequestError

if TYPE_CHECKING:
    from dcompile.runtime.loop import Result, Runner

app = typer.Typer(
    name="dcompile",
    help="Compile a diffusion language model: dcompile CHECKPOINT -o OUT.dcx. Then: dcompile run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
SUFFIX = ".dcx"
_DEFAULT_LENGTH = 128
_ArtifactPath = Annotated[Path, typer.Argument(metavar="OUT.dcx", help="An artifact.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]


@app.command("compile")
def compile_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a model.pt or an exported .pt2.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A .dcx file, or a folder.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="auto, cpu or cuda:sm_XX.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Positions a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in flight.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Positions decoded together.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Which candidates commit: auto, a name, or file.py:name.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="steps: low_confidence, random, margin or entropy.")
    ] = None,
    manager: Annotated[
        str | None,
        typer.Option(help="blockwise, canvas (all positions as one block) or pipelined (D2F)."),
    ] = None,
    max_blocks: Annotated[
        int | None, typer.Option(help="pipelined: blocks undecided at a time.")
    ] = None,
    aligned: Annotated[
        bool | None,
        typer.Option(
            "--aligned/--unaligned", help="The first block begins at a multiple of its length."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="none, prefix, dual, vicinity, periodic, active or block.")
    ] = None,
    look_back: Annotated[int | None, typer.Option(help="vicinity: rows before the block.")] = None,
    look_ahead: Annotated[int | None, typer.Option(help="vicinity: rows after it.")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="vicinity: first iterations over all rows.")
    ] = None,
    refresh_every: Annotated[
        int | None, typer.Option(metavar="K", help="periodic: iterations between refreshes.")
    ] = None,
    cross_block: Annotated[
        bool | None,
        typer.Option(
            "--cross-block/--no-cross-block",
            help="block: store a block in the next one's first forward, or in one of its own.",
        ),
    ] = None,
    smoothing: Annotated[float | None, typer.Option(help="Weight of iteration smoothing.")] = None,
    moe_capacity: Annotated[
        float | None,
        typer.Option(help="An expert takes so many times its even share of a sequence's tokens."),
    ] = None,
    moe_overflow: Annotated[
        str | None, typer.Option(help="What a token does beyond it: drop, or reroute.")
    ] = None,
    expert_pool: Annotated[
        int | None, typer.Option(help="Experts that the tokens of a block choose from.")
    ] = None,
    mask_id: Annotated[int | None, typer.Option(help="Where the checkpoint lacks it.")] = None,
    eos_id: Annotated[
        list[int] | None, typer.Option(help="Instead of the checkpoint's; repeatable.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare around every pass.")] = False,
    stop_after: Annotated[
        str | None, typer.Option(metavar="PASS", help="End the pipeline after this pass.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PASS", help="Leave a pass out; repeatable.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="inside|external", help="In the artifact, or a folder beside it."),
    ] = None,
    threads: _Threads = None,
    quiet: _Quiet = False,
) -> None:
    """Compile a checkpoint (also without the word: `dcompile CHECKPOINT`)."""
    given: dict[str, Any] = {
        "target": target,
        "dtype": dtype,
        "max_length": max_length,
        "batch": batch,
        "block_length": block_length,
        "policy": policy,
        "score": score,
        "manager": manager,
        "max_blocks": max_blocks,
        "aligned": aligned,
        "cache": cache,
        "look_back": look_back,
        "look_ahead": look_ahead,
        "warmup": warmup,
        "refresh_every": refresh_every,
        "cross_block": cross_block,
        "smoothing": smoothing,
        "moe_capacity": moe_capacity,
        "moe_overflow": moe_overflow,
        "expert_pool": expert_pool,
        "mask_id": mask_id,
        "eos_ids": tuple(eos_id) if eos_id else None,
        "check": check,
        "stop_after": stop_after,
        "skip": tuple(skip) if skip else None,
        "weights": weights,
        "threads": threads,
    }
    from dcompile.driver import compile_checkpoint
    from dcompile.options import Options

    options = Options(**{name: value for name, value in given.items() if value is not None})
    out = out or _default_out(checkpoint)
    with _progress(quiet) as progress:
        compile_checkpoint(checkpoint, options, out, progress=progress)
    if not quiet:
        typer.echo(f"wrote {out}", err=True)


def _default_out(checkpoint: Path) -> Path:
    path = checkpoint.resolve()
    # The dot of `LLaDA-1.5` begins no suffix.
    return Path((path.stem if path.suffix in (".pt", ".pt2") else path.name) + SUFFIX)


@app.command()
def run(
    artifact: _ArtifactPath,
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
    gen_length: Annotated[int | None, typer.Option(help="Positions to generate.")] = None,
    threshold: Annotated[float | None, typer.Option()] = None,
    threshold_low: Annotated[float | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(help="Iterations a block.")] = None,
    set_parameter: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any parameter of the policy."),
    ] = None,
    early_stop: Annotated[
        bool,
        typer.Option("--early-stop/--no-early-stop", help="Stop after the block with an EOS."),
    ] = True,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print each block when it is done.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Hash the files.")] = True,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where external weights were moved.")
    ] = None,
    threads: _Threads = None,
    quiet: _Quiet = False,
) -> None:
    """Generate from an artifact."""
    if sum(given is not None for given in (prompt, prompt_ids, prompts, queue)) != 1:
        raise typer.BadParameter("give one of --prompt, --prompt-ids, --prompts and --queue")
    if stream and queue is not None:
        raise typer.BadParameter("--queue prints whole results: leave --stream out")
    parameters = _parameters(set_parameter or [])
    named = {"threshold": threshold, "threshold_low": threshold_low, "steps": steps}
    parameters |= {name: float(value) for name, value in named.items() if value is not None}
    asked = _prompts(prompt, prompt_ids, prompts or queue)
    from dcompile.on_the_spot import install
    from dcompile.runtime.loop import Runner

    install()
    if not verify and not quiet:
        typer.echo("--no-verify: no file was compared with its hash", err=True)
    request: dict[str, Any] = {"temperature": temperature, "seed": seed, "early_stop": early_stop}
    with _progress(quiet) as progress:
        progress("loading")
        runner = Runner.load(artifact, verify=verify, threads=threads, weights_at=weights)
        if queue is not None:
            request["on_result"] = _print_numbered
        if not stream:
            progress("generating")
            results = _generate(runner, asked, chat, gen_length, parameters, **request)
    if stream:
        file = sys.stderr if as_json else sys.stdout
        request["on_block"] = printer = _Stream(runner, file, prompts is not None)
        results = _generate(runner, asked, chat, gen_length, parameters, **request)
        printer.end()
    for result in () if queue is not None else results:
        if as_json:
            typer.echo(json.dumps(asdict(result), ensure_ascii=False))
        elif not stream:
            typer.echo(_shown(result.text, result.tokens))
        if not as_json and not quiet:
            typer.echo(_summary(result), err=True)


@app.command()
def calibrate(
    artifact: _ArtifactPath,
    prompts: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="As for run.")],
    agreement: Annotated[
        float, typer.Option(help="Share of prompts to answer as the reference does.")
    ] = 0.99,
    gen_length: Annotated[int | None, typer.Option(help="Positions to generate.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    write: Annotated[
        bool, typer.Option("--record", help="Make the threshold the artifact's default.")
    ] = False,
    threads: _Threads = None,
    quiet: _Quiet = False,
) -> None:
    """Find the lowest threshold that agrees with an uncached decode of one token a forward."""
    from dcompile.calibrate import calibrate as calibrate_runner
    from dcompile.calibrate import record
    from dcompile.runtime.loop import Runner

    asked = _prompts(None, None, prompts)
    with _progress(quiet) as progress:
        progress("decoding")
        runner = Runner.load(artifact, threads=threads)
        ids = [runner.encode(prompt, chat) for prompt in asked]
        length = gen_length or _default_gen_length(runner, ids)
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


@app.command()
def explain(
    artifact: _ArtifactPath,
    pass_name: Annotated[str | None, typer.Argument(metavar="[PASS]")] = None,
    kind: Annotated[
        str | None,
        typer.Option("--remarks", metavar="missed|passed|all", help="What was fused, what not."),
    ] = None,
    graph: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the graph (after PASS); or .dot.")
    ] = None,
    times: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Run the passes again and time them.")
    ] = None,
) -> None:
    """Show the passes and kernels of an artifact, or what one pass changed."""
    from dcompile.explain import explain as explain_artifact
    from dcompile.explain import pass_times, remarks, show

    if graph is not None:
        from dcompile.drawing import draw
        from dcompile.explain import stage_after
        from dcompile.runtime.artifact import open_artifact

        draw(stage_after(open_artifact(artifact, verify=False), pass_name), graph)
    elif kind is not None:
        typer.echo(remarks(artifact, kind, pass_name), nl=False)
    elif times is not None:
        typer.echo(pass_times(artifact, times), nl=False)
    else:
        show(explain_artifact(artifact, pass_name))


@app.command()
def profile(
    artifact: _ArtifactPath,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT")] = None,
    prompt_ids: Annotated[str | None, typer.Option(metavar="1,2,3")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE.jsonl")] = None,
    gen_length: Annotated[int | None, typer.Option(help="Positions to generate.")] = None,
    set_parameter: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any parameter of the policy."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Plain and timed generations, each.")] = 3,
    launches: Annotated[bool, typer.Option("--launches", help="A line for every launch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Trace events, for ui.perfetto.dev.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One self-contained page.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="An artifact, or a profile's JSON.")
    ] = None,
    threads: _Threads = None,
    quiet: _Quiet = False,
) -> None:
    """Generate, and show where time and memory went, launch by launch.

    Without a prompt, from random tokens; always to the end of the generated length.
    """
    given = sum(each is not None for each in (prompt, prompt_ids, prompts))
    if given > 1:
        raise typer.BadParameter("give one of --prompt, --prompt-ids and --prompts")
    asked = _prompts(prompt, prompt_ids, prompts) if given else []
    parameters = _parameters(set_parameter or [])
    from dcompile.profile.command import Asked, run_profile

    with _progress(quiet) as progress:
        wanted = Asked(asked, gen_length, parameters, rounds, threads, progress)
        shown = run_profile(artifact, wanted, compare_with=compare)
        shown.write(trace, html)
    shown.print(as_json, launches)


@app.command()
def verify(
    artifact: _ArtifactPath,
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint that it came from.")],
    run_model: Annotated[
        bool,
        typer.Option("--run/--no-run", help="Also run each pass's program, and each layer."),
    ] = True,
    quiet: _Quiet = False,
) -> None:
    """Compare an artifact with its checkpoint: each pass, each stored value, each layer."""
    from dcompile.verify import verify as verify_artifact

    with _progress(quiet) as progress:
        progress("loading")
        report = verify_artifact(artifact, checkpoint, run_model=run_model, progress=progress)
    typer.echo(report.rstrip("\n"))


@app.command()
def bench(
    artifact: _ArtifactPath,
    against: Annotated[
        str, typer.Option(metavar="eager,compile", help="Rivals, separated by commas.")
    ] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="What the rivals run.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions in the sequence.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    threads: _Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: _Quiet = False,
) -> None:
    """Time one forward of an artifact, beside its rivals and the machine's floor."""
    from dcompile.bench import bench as bench_artifact

    rivals = [name.strip() for name in against.split(",") if name.strip()]
    with _progress(quiet) as progress:
        progress("measuring")
        table = bench_artifact(
            artifact, rivals, checkpoint, context=context, rounds=rounds, threads=threads
        )
    typer.echo(json.dumps(table.json()) if as_json else table.text(), nl=as_json)


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="An artifact, or a checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file or folder to write.")],
    format: Annotated[str, typer.Option(help="onnx, pt2, folder or dcx.")],
    entry: Annotated[
        str, typer.Option(help="window: some positions, keys and values in and out. full: all.")
    ] = "window",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Positions a sequence, at most.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Positions decoded together.")] = None,
    policy: Annotated[str | None, typer.Option(help="Which candidates commit.")] = None,
    score: Annotated[str | None, typer.Option(help="As for compile.")] = None,
    cache: Annotated[str | None, typer.Option(help="The choice of rows that is recorded.")] = None,
    mask_id: Annotated[int | None, typer.Option(help="Where the checkpoint lacks it.")] = None,
    eos_id: Annotated[
        list[int] | None, typer.Option(help="Instead of the checkpoint's; repeatable.")
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Take a model out: its denoising step as ONNX or .pt2, an artifact as a folder or one file.

    Options from --max-length on are for checkpoints; an artifact has its own.
    """
    from dcompile.export.command import Asked, export
    from dcompile.options import Options

    given: dict[str, Any] = {
        "max_length": max_length,
        "block_length": block_length,
        "policy": policy,
        "score": score,
        "cache": cache,
        "mask_id": mask_id,
        "eos_ids": tuple(eos_id) if eos_id else None,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    options = Options(dtype=dtype, **chosen)
    options.validate()
    with _progress(quiet) as progress:
        made = export(Asked(model, out, format, progress, entry, options))
    if not quiet:
        for note in made.notes:
            typer.echo(note, err=True)
        typer.echo(f"wrote {', '.join(map(str, made.files))}", err=True)


@app.command()
def tune(
    path: Annotated[
        Path, typer.Argument(metavar="ARTIFACT|CHECKPOINT", help="Whose kernels to tune.")
    ],
    families: Annotated[
        str, typer.Option(metavar="linear,attend", help="Only these; default all.")
    ] = "",
    rows: Annotated[int, typer.Option(min=1, help="Rows of an iteration.")] = 32,
    most: Annotated[int, typer.Option(min=1, help="Choices of tiles a shape.")] = 32,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Default: the compiler's own table.")
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Time the tiles of a model's CUDA kernels on this GPU; later compiles use the fastest."""
    from rich.console import Console

    from dcompile.tuning.command import shown, tune_path

    chosen = [name.strip() for name in families.split(",") if name.strip()]
    with _progress(quiet) as progress:
        progress("looking for a GPU")
        found = tune_path(path, families=chosen, rows=rows, most=most, out=out, progress=progress)
    Console(width=120).print(shown(found))


@app.command()
def demo() -> None:
    """Compile and run the small trained model that ships with the package."""
    from dcompile.demo import run_demo

    run_demo()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a named error, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A named interrupt lets half-made files be removed; by default a process just ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(_with_command(given), prog_name="dcompile")
    except DcompileError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        typer.echo("MemoryError: this machine has too little memory for that", err=True)
        sys.exit(1)


def _with_command(arguments: list[str]) -> list[str]:
    """`dcompile CHECKPOINT ...` means `dcompile compile CHECKPOINT ...`."""
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    if not arguments or arguments[0] in {*commands, "--help", "--version"}:
        return arguments
    return ["compile", *arguments]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dcompile {version('dcompile')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


Prompt = str | list[int]


def _prompts(prompt: str | None, prompt_ids: str | None, file: Path | None) -> list[Prompt]:
    if prompt is not None:
        return [prompt]
    if prompt_ids is not None:
        try:
            return [[int(part) for part in prompt_ids.split(",") if part.strip()]]
        except ValueError as error:
            raise typer.BadParameter("--prompt-ids takes numbers: 1,2,3") from error
    assert file is not None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the prompts cannot be read: {error}", where=str(file)) from error
    return [
        _prompt_of(line, f"{file}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _prompt_of(line: str, where: str) -> Prompt:
    remedy = 'write {"prompt": "text"} or {"prompt_ids": [1, 2, 3]}'
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError("the line is not JSON", where=where, remedy=remedy) from error
    match item:
        case {"prompt": str(text)} if "prompt_ids" not in item:
            return text
        case {"prompt_ids": list(ids)} if "prompt" not in item:
            return ids
    raise RequestError("the line has no prompt, or more than one", where=where, remedy=remedy)


def _parameters(assignments: Sequence[str]) -> dict[str, float]:
    parameters = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            parameters[name.strip().replace("-", "_")] = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"--set takes NAME=NUMBER, not {assignment!r}") from error
    return parameters


def _generate(
    runner: Runner,
    prompts: Sequence[Prompt],
    chat: bool,
    gen_length: int | None,
    parameters: dict[str, float],
    **request: Any,
) -> list[Result]:
    known = set(runner.limits.parameters)
    if unknown := sorted(set(parameters) - known):
        what = "the compiled policy has no such parameter"
        remedy = f"it has: {', '.join(sorted(known)) or 'none'}"
        raise RequestError(what, where=unknown[0], remedy=remedy)
    ids = [runner.encode(prompt, chat) for prompt in prompts]
    length = _default_gen_length(runner, ids) if gen_length is None else gen_length
    return runner.generate(ids, gen_length=length, **{**request, **parameters})


def _default_gen_length(runner: Runner, ids: Sequence[list[int]]) -> int:
    return runner.limits.default_length(max(map(len, ids), default=0), _DEFAULT_LENGTH)


class _Stream:
    """Prints what each block added; of several prompts, each block on a line with its number."""

    def __init__(self, runner: Runner, file: IO[str], several: bool) -> None:
        self._runner, self._file, self._several = runner, file, several
        self._tokens: dict[int, list[int]] = {}
        self._printed: dict[int, str] = {}
        self._ended: set[int] = set()

    def __call__(self, index: int, tokens: list[int]) -> None:
        so_far = self._tokens.setdefault(index, [])
        for token in tokens:
            if token in self._runner.limits.eos_ids:
                self._ended.add(index)
            if index not in self._ended:
                so_far.append(token)
        # A block may end inside a character; its other half comes with the next one.
        text = _shown(self._runner.decode(so_far), so_far).rstrip("\ufffd")
        added = text[len(self._printed.get(index, "")) :]
        self._printed[index] = text
        line = f"[{index}] {added}\n" if self._several else added
        print(line, end="", file=self._file, flush=True)

    def end(self) -> None:
        if not self._several:
            print(file=self._file, flush=True)


def _print_numbered(index: int, result: Result) -> None:
    line = json.dumps({"index": index, **asdict(result)}, ensure_ascii=False)
    print(line, flush=True)


def _shown(text: str | None, tokens: Sequence[int]) -> str:
    return text if text is not None else ",".join(map(str, tokens))


def _summary(result: Result) -> str:
    return (
        f"{len(result.tokens)} tokens, {result.forwards} forwards, "
        f"{result.tokens_per_forward:.2f} tokens a forward, "
        f"{result.tokens_per_second:.1f} tokens a second"
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is going on, to a person only."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)
