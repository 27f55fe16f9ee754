"""What the command line asks of a profile: one or two artifacts, tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from dcompile.profile import compare, profile_artifact, table
from dcompile.profile.collect import Capture, Progress
from dcompile.profile.summary import Profile, summarize


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


def run_profile(artifact: Path, asked: Asked, *, compare_with: Path | None) -> Shown:
    """Profile an artifact and, where `compare_with` is one too, that as well."""
    other = None
    if compare_with is not None and compare_with.suffix == ".json":
        other = compare.stored(compare_with)
    profile = summarize(asked.capture(artifact))
    if compare_with is not None and other is None:
        other = compare.side(summarize(asked.capture(compare_with)), str(compare_with))
    return Shown(profile, other)
