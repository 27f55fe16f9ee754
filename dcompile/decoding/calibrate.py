"""The lowest threshold whose answers agree with the reference decode: no cache, one token a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcompile.errors import OptionError, RequestError
from dcompile.runtime.artifact import ArtifactWriter, open_artifact
from dcompile.runtime.decode.caches import none
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
_OWNED = ("format", "files", "sha256")
"""Keys of a manifest that its writer fills."""


@dataclass(frozen=True)
class Trial:
    """What one threshold came to."""

    threshold: float
    agreement: float
    """Share of prompts whose tokens before the end are the reference's."""
    forwards: float
    """A prompt."""


@dataclass(frozen=True)
class Calibration:
    """All thresholds that were tried, ascending, and the one to use."""

    prompts: int
    wanted: float
    reference_forwards: float
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial | None:
        """The lowest from which on every threshold agrees well enough; None where 1 does not."""
        best = None
        for trial in reversed(self.trials):
            if trial.agreement < self.wanted:
                break
            best = trial
        return best

    def text(self) -> str:
        lines = [
            f"{self.prompts} prompts; reference, uncached, one token a forward: "
            f"{self.reference_forwards:.2f} forwards a prompt",
            f"{'threshold':>9}{'agreement':>11}{'forwards':>10}{'of reference':>14}",
        ]
        for trial in self.trials:
            mark = "  <" if trial is self.chosen else ""
            lines.append(
                f"{trial.threshold:9g}{trial.agreement:11.1%}{trial.forwards:10.2f}"
                f"{trial.forwards / self.reference_forwards:14.2f}{mark}"
            )
        return "\n".join(lines)


def calibrate(
    runner: Runner,
    prompts: Sequence[str | Sequence[int]],
    *,
    gen_length: int,
    agreement: float = 0.99,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Calibration:
    """Decode the prompts with each threshold, greedily. The artifact's own cache is what is tried.

    The reference is the same policy with every threshold at 1, which nothing exceeds, and every row
    computed every time. Raises RequestError where the policy has no threshold.
    """
    if not 0 < agreement <= 1:
        raise RequestError(f"{agreement!r} is no share", where="agreement", remedy="0.99, say")
    if not prompts:
        raise RequestError("there is no prompt to calibrate with")
    names = [name for name in runner.limits.parameters if name.startswith("threshold")]
    if "threshold" not in names:
        known = ", ".join(runner.limits.parameters) or "none"
        what = "the compiled policy has no threshold to calibrate"
        raise RequestError(what, where=f"parameters: {known}", remedy="use --policy threshold")

    def decode(**parameters: Any) -> list[Result]:
        return runner.generate(prompts, gen_length=gen_length, **parameters)

    own, runner.cache = runner.cache, none
    try:
        reference = decode(**dict.fromkeys(names, 1.0))
    finally:
        runner.cache = own
    trials = tuple(
        _trial(threshold, decode(threshold=threshold), reference)
        for threshold in sorted(thresholds)
    )
    return Calibration(len(prompts), agreement, _forwards(reference), trials)


def _trial(threshold: float, results: Sequence[Result], reference: Sequence[Result]) -> Trial:
    same = sum(a.tokens == b.tokens for a, b in zip(results, reference, strict=True))
    return Trial(threshold, same / len(results), _forwards(results))


def _forwards(results: Sequence[Result]) -> float:
    return sum(result.forwards for result in results) / len(results)


def record(path: str | Path, parameters: Mapping[str, float]) -> None:
    """Write an artifact again with other defaults for its policy's parameters.

    Raises OptionError for a parameter that the policy does not have, OutputError where it cannot be
    written; the old artifact is there until the new one is whole.
    """
    artifact = open_artifact(path)
    manifest = {key: value for key, value in artifact.manifest.items() if key not in _OWNED}
    known = manifest["policy"]["parameters"]
    if unknown := sorted(set(parameters) - set(known)):
        what = f"the compiled policy has no parameter {unknown[0]!r}"
        raise OptionError(what, remedy=f"it has: {', '.join(known) or 'none'}")
    manifest["policy"] = {**manifest["policy"], "parameters": {**known, **parameters}}
    with ArtifactWriter(path) as writer:
        for name in artifact.names:
            writer.add_bytes(name, bytes(artifact.bytes(name)))
        writer.finish(manifest)
