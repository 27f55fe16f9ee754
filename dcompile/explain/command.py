"""What the compiler did, in words: the report of a compile, the stages, the diff of one pass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dcompile.errors import ArtifactError, OptionError
from dcompile.explain.kernels import kernel_table
from dcompile.ir.remarks import Remark
from dcompile.options import Options
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.decode.caches import cache_policy
from dcompile.untrusted import parse_json

REMARKS = ("missed", "passed", "all")
REMARKS_FILE = "remarks.json"
READ_AT_LOAD = ("target", "threads")


def explain(path: str | Path, pass_name: str | None = None) -> str:
    """The report of an artifact; with a pass, what it changed as a unified diff."""
    artifact = open_artifact(Path(path), verify=False)
    stages = stages_of(artifact)
    if pass_name is None:
        names = ", ".join(_pass_of(s) for s in stages)
        sections = [_report(artifact), kernel_table(artifact), _unread(artifact)]
        return "\n".join([*(s for s in sections if s), f"stages    {names}\n"])
    return "".join(_diff(artifact, stages, i) for i in _sites(stages, pass_name))


def _report(artifact: Artifact) -> str:
    """The report without its counts of launches, which the kernel table has too."""
    sections = artifact.text("report.txt").split("\n\n")
    return "\n\n".join(s for s in sections if not s.startswith("kernel "))


def stages_of(artifact: Artifact) -> list[str]:
    """The files that hold the program as traced and after each pass that changed it."""
    return [name for name in artifact.names if name.startswith("stages/")]


def stage_after(artifact: Artifact, pass_name: str | None) -> str:
    """The program after a pass (its last run), or after all."""
    stages = stages_of(artifact)
    at = _sites(stages, pass_name)[-1] if pass_name is not None else len(stages) - 1
    return artifact.text(stages[at])


def _sites(stages: list[str], pass_name: str) -> list[int]:
    sites = [i for i, s in enumerate(stages) if _pass_of(s) == pass_name]
    if not sites:
        raise OptionError(
            f"no pass named {pass_name!r} changed this program",
            remedy=f"one of {', '.join(dict.fromkeys(_pass_of(s) for s in stages[1:]))}",
        )
    return sites


def remarks(path: str | Path, kind: str, pass_name: str | None = None) -> str:
    """What passes made and what they left alone, `kind` of them: missed, passed or all."""
    if kind not in REMARKS:
        raise OptionError(
            f"there are no remarks of kind {kind!r}", remedy=f"one of {', '.join(REMARKS)}"
        )
    artifact = open_artifact(Path(path), verify=False)
    shown = [
        r
        for r in _notes(artifact)[0]
        if kind in ("all", r.kind) and pass_name in (None, r.pass_name)
    ]
    lines = [f"{r.where}: {r.kind} {r.pass_name}: {r.text}" for r in shown]
    return "\n".join(lines or [f"no {'' if kind == 'all' else kind + ' '}remarks"]) + "\n"


def _notes(artifact: Artifact) -> tuple[list[Remark], list[str]]:
    """The remarks of the passes, and the options that the compile never read."""
    if REMARKS_FILE not in artifact.names:
        remedy = "compile the model again"
        raise ArtifactError("it holds no remarks", where=str(artifact.path), remedy=remedy)
    try:
        notes = parse_json(artifact.bytes(REMARKS_FILE))
        return [Remark(**item) for item in notes["remarks"]], [str(n) for n in notes["unread"]]
    except (ValueError, TypeError, KeyError) as error:
        what = f"its remarks cannot be read: {error}"
        remedy = "compile the model again"
        raise ArtifactError(what, where=str(artifact.path), remedy=remedy) from error


def _unread(artifact: Artifact) -> str:
    """The options that neither the compile asked for nor the runtime will."""
    if REMARKS_FILE not in artifact.names:
        return ""
    options = _Watched(artifact.manifest["options"])
    cache_policy(options, artifact.manifest["model"]["block_length"])
    unread = [n for n in _notes(artifact)[1] if n not in {*options.reads, *READ_AT_LOAD}]
    default = Options()
    told = [
        f"{name} = {options[name]}" + (", given in vain" if _given(name, options, default) else "")
        for name in unread
        if name in options and name in vars(default)
    ]
    return "options that nobody read\n" + "".join(f"  {line}\n" for line in told or ["none"])


def _given(name: str, options: Mapping[str, Any], default: Options) -> bool:
    return bool(options[name] != getattr(default, name))


class _Watched(dict[str, Any]):
    """The recorded options, and which of them the cache policy asks for."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.reads: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.reads.add(key)
        return super().get(key, default)


def _pass_of(stage: str) -> str:
    return Path(stage).stem.partition("_")[2]


def _diff(artifact: Artifact, stages: list[str], at: int) -> str:
    if at == 0:
        return artifact.text(stages[0])
    before, after = (artifact.text(s).splitlines(keepends=True) for s in stages[at - 1 : at + 1])
    return "".join(difflib.unified_diff(before, after, stages[at - 1], stages[at], n=1))


def show(text: str) -> None:
    """On standard output, a diff in colour where that is a terminal."""
    out = Console(highlight=False, soft_wrap=True)
    for line in text.splitlines():
        out.print(Text(line, style=_style(line) if out.is_terminal else ""))


def _style(line: str) -> str:
    if line.startswith(("+++ ", "--- ")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
