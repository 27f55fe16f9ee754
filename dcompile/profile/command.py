"""What the command line asks of a profile: one or two artifacts, tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from dcompile.errors import OutputError
from dcompile.profile import compare, profile_artifact, table
from dcompile.profile.collect import Capture, Progress
from dcompile.profile.summary import Profile, summarize
from dcompile.profile.trace import trace


@dataclass(frozen=True)
class Asked:
    """A request as typed, and how often it is served."""

    prompts: Sequence[str | list[int]]
    gen_length: int | None
    parameters: Mapping[str, float]
    rounds: int
    threads: int | None
    progress: Progress

    def capture(self, artifact: Path) -> Capture:
        return profile_artifact(
            artifact,
            self.prompts,
            self.gen_length,
            self.parameters,
            rounds=self.rounds,
            threads=self.threads,
            progress=self.progress,
        )


@dataclass(frozen=True)
class Shown:
    """A profile, and what it stands beside."""

    capture: Capture
    profile: Profile
    other: compare.Side | None

    def print(self, as_json: bool, launches: bool) -> None:
        """Tables for a person, or one JSON object."""
        if as_json:
            typer.echo(self.profile.json())
            return
        out = table.console()
        if self.other is None:
            table.show(self.profile, out, launches)
        else:
            compare.show(compare.side(self.profile, self.profile.artifact), self.other, out)

    def write(self, trace_file: Path | None, html_file: Path | None) -> None:
        """The trace and the page, where they are asked for."""
        if trace_file is not None:
            _write(trace_file, trace(self.capture, self.profile))
        if html_file is not None:
            from dcompile.profile.page import page

            _write(html_file, page(self.profile, self.capture.runner.artifact))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"it could not be written: {error.strerror or error}"
        raise OutputError(what, where=str(file), remedy="name another place") from error


def run_profile(artifact: Path, asked: Asked, *, compare_with: Path | None) -> Shown:
    """Profile an artifact and, where `compare_with` is one too, that as well."""
    other = None
    if compare_with is not None and compare_with.suffix == ".json":
        other = compare.stored(compare_with)
    captured = asked.capture(artifact)
    profile = summarize(captured)
    if compare_with is not None and other is None:
        other = compare.side(summarize(asked.capture(compare_with)), str(compare_with))
    return Shown(captured, profile, other)
