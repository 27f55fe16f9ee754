"""Random programs: a model's step through all passes, each stage beside the eager module."""

from __future__ import annotations

import operator
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dcompile.codegen.cpu.lower import lower
from dcompile.driver.compile import compile_module
from dcompile.driver.origin import of_module as origin_of_module
from dcompile.driver.origin import trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.settle import settle
from dcompile.errors import DcompileError, OptionError, UnsupportedModel, VerificationError
from dcompile.ir import operators
from dcompile.ir.program import Program
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner
from dcompile.verify.command import Compiled, compare_layers
from dcompile.verify.stages import Case as Case_
from dcompile.verify.stages import Recorded, Stages, Values, cases
from fuzz.children import Outcome, run_case
from fuzz.edits import copied, edit
from fuzz.models import Spec, build, draw, simpler

Case = dict[str, Any]

LENGTH = 24


def options_of(spec: Spec) -> Options:
    block = spec["block"]
    attends = any(layer["attention"] is not None for layer in spec["layers"])
    causal = spec["mask"].startswith("blocks") and attends
    return Options(
        mask_id=spec["vocab"] - 1,
        max_length=LENGTH // block * block,
        block_length=block,
        cache="block" if causal else "dual",
        batch=2,
    )


EDITS = 9
"""Programs made of one trace, beside itself."""


def attempt(spec: Spec, native: bool = False, edits: Sequence[int] = ()) -> list[tuple[str, str]]:
    """For the model, and for each edit of its trace: ("passed" | "refused" | "failed", why).

    `native` builds the model's artifact too, and compares its launches.
    """
    model = build(spec)
    options = options_of(spec)
    try:
        origin = origin_of_module(model, options=options)
        settled = settle(options, origin.spec)
        program = trace_origin(origin, settled, lambda _: None)
    except DcompileError as error:
        return [_judged(error)]
    inputs = cases(program.shape, spec["vocab"] - 1, spec["seed"])

    def compiled(program: Program, wanted: list[Values] | None = None) -> tuple[str, str]:
        stages = Stages(model, origin.read, settled.parameters, inputs, wanted=wanted or [])
        try:
            run(program, settled.options, stages)
            if not native or wanted:
                return "passed", f"{len(stages.passed)} stages"
            made = Compiled(origin, settled, program, lower(program), stages)
            with tempfile.TemporaryDirectory() as folder:
                path = compile_module(model, options, Path(folder) / "m.dcx")
                compare_layers(Runner.load(path, threads=1), made)
            return "passed", "native"
        except DcompileError as error:
            return _judged(error)

    others = [copied(program) for _ in edits]
    out = [compiled(program)]
    if out[0][0] == "refused":
        return out
    for other, number in zip(others, edits, strict=True):
        what = edit(other, number)
        try:
            wanted = _wanted(other, inputs, Stages(model, origin.read, settled.parameters, inputs))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            out.append(("refused", f"no program: {type(error).__name__}"))
            continue
        if wanted is None:
            out.append(("refused", "not finite"))
            continue
        kind, why = compiled(other, wanted)
        out.append((kind, f"{why} [{what}]" if kind == "failed" else why))
    return out


def _judged(error: DcompileError) -> tuple[str, str]:
    if isinstance(error, VerificationError):
        finite = "own logits are not finite" not in str(error)
        return ("failed", str(error)) if finite else ("refused", "not finite")
    kind = "refused" if isinstance(error, (UnsupportedModel, OptionError)) else "failed"
    return kind, f"{type(error).__name__}: {error.what}"


def _wanted(program: Program, inputs: Sequence[Case_], stages: Stages) -> list[Values] | None:
    """What an edited trace itself chooses, run by torch as it stands; None where it is not finite.

    Logits may be finite although values before them are not: torch's attention over queries that are no
    numbers is 0, or something else in another of its kernels.
    """
    out = []
    (choose,) = program.calls(operators.CHOOSE)
    for case in inputs:
        recorded = Recorded(program)
        with torch.no_grad():
            recorded.run(*stages.arguments(program, case))
        numbers = not any(bool(v.isnan().any()) for v in recorded.values.values())
        if not numbers or not bool(recorded.values[choose.args[0]].isfinite().all()):
            return None
        chosen = {
            str(user.args[1]): recorded.values[user]
            for user in choose.users
            if user.target is operator.getitem
        }
        ids = case.ids[case.positions()][None]
        live = ids == program.shape.mask_id
        margin = chosen.get("2", torch.zeros(live.shape))
        out.append(
            {"token": chosen["0"], "confidence": chosen["1"], "margin": margin, "live": live}
        )
    return out


class Programs:
    """Random models, and edits of their traces; each N-th is built natively too, where `native` is N."""

    def __init__(self, native: int = 0) -> None:
        self.native = native
        # What is loaded here is not loaded again in each child.
        attempt(draw(0))

    def draw(self, seed: int) -> Case:
        native = bool(self.native) and seed % self.native == 0
        return {"spec": draw(seed), "native": native, "edits": [seed + i for i in range(EDITS)]}

    def run(self, case: Case) -> Outcome:
        # A native build waits for the C++ compiler.
        native = case["native"]
        return run_case(
            lambda: self._run(case), 120 if native else 60, asleep=900 if native else 30
        )

    def _run(self, case: Case) -> tuple[str, str, dict[str, int]]:
        results = attempt(case["spec"], case["native"], case["edits"])
        counts = Counter(kind for kind, _ in results)
        worst = min(results, key=lambda r: ("failed", "refused", "passed").index(r[0]))
        return worst[0] if worst[0] == "failed" else results[0][0], worst[1], dict(counts)

    def simpler(self, case: Case) -> list[Case]:
        edits = case["edits"]
        out = [{**case, "edits": []}] if edits else []
        out += [{**case, "edits": [one]} for one in edits if len(edits) > 1]
        return out + [{**case, "spec": spec} for spec in simpler(case["spec"])]

    def group(self, case: Case) -> str:
        return "native" if case["native"] else "stages"
