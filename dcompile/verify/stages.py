"""Each stage of a compile, run by the interpreter, against the eager module on real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Node

from dcompile.driver.pipeline import name_of
from dcompile.errors import VerificationError
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.program import Exactness, Pass, Program, Stage, StepShape
from dcompile.ir.weights import Read
from dcompile.step.trace import logits_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of a norm, in one step: what order of additions may change at the dtype's precision."""
_REMEDY = "report it, with the model's config; --skip that pass meanwhile"
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A canvas whose last block is being decided: ids i64 [T], some of the block's tokens decided."""

    ids: Tensor
    block: int

    @property
    def length(self) -> int:
        return len(self.ids)

    def positions(self) -> Tensor:
        return torch.arange(self.length - self.block, self.length)


def cases(shape: StepShape, vocab: int, seed: int = 0, count: int = 2) -> list[Case]:
    """Random canvases: one block alone, and several, of a length that nothing divides where it may."""
    random = torch.Generator().manual_seed(seed)
    block, longest = shape.block_length, shape.positions
    lengths = [block, min(longest, 3 * block + 5), min(longest, 2 * block + 1)][:count]
    made = []
    for length in dict.fromkeys(lengths):
        ids = torch.randint(0, vocab, (length,), generator=random)
        ids[ids == shape.mask_id] = (shape.mask_id + 1) % vocab
        masked = torch.rand(block, generator=random) < 0.7
        masked[0] = True
        ids[length - block :][masked] = shape.mask_id
        made.append(Case(ids, block))
    return made


def step_inputs(
    case: Case, shape: StepShape, parameters: Mapping[str, float], rows: Tensor | None = None
) -> Values:
    """The step's inputs for one sequence, over all its positions or over the rows given."""
    rows = torch.arange(case.length) if rows is None else rows
    pos = case.positions()
    chosen = (pos - 1).clamp_min(0) if shape.shift else pos
    place = torch.full((case.length,), -1)
    place[rows] = torch.arange(len(rows))
    span = shape.model_block
    limit = torch.full((len(rows),), case.length)
    one = torch.ones(1, dtype=torch.int64)
    return {
        "row_seq": torch.zeros(len(rows), dtype=torch.int64),
        "row_pos": rows,
        "row_limit": limit if span is None else ((rows // span + 1) * span).clamp_max(case.length),
        "block_seq": one * 0,
        "block_pos": pos[None],
        "choice_row": place[chosen][None],
        "iteration": one * 0,
        "entered": (case.ids[pos] == shape.mask_id).sum()[None],
        "temperature": torch.zeros(1),
        "seed": one * 0,
        "tick": one * 0,
        "prompt_end": one * (case.length - case.block),
        "full": one,
        "row_weight": torch.full((len(rows),), 0.3),
        **{name: torch.full((1,), number) for name, number in parameters.items()},
    }


@dataclass
class Stages:
    """Observes: raises VerificationError that names the first pass that departs.

    `model` is the eager module in the program's dtype, `read` gives its tensors. An EXACT pass must keep
    the outputs' bits, any other the confidences within TOLERANCE of the eager module's, and its tokens where
    these are not close to another.
    """

    model: nn.Module
    read: Read
    parameters: Mapping[str, float]
    inputs: Sequence[Case]
    passed: list[str] = field(default_factory=list)
    worst: float = 0.0
    _made: dict[str, tuple[object, Tensor]] = field(default_factory=dict)
    _before: list[Values] = field(default_factory=list)
    wanted: list[Values] = field(default_factory=list)

    def before(self, program: Program, item: Pass) -> None:
        self.begin(program)

    def begin(self, program: Program) -> None:
        """Compare a program that no pass has been watched over yet."""
        if not self.wanted:
            self.wanted = [self._eager(case, program.shape) for case in self.inputs]
        if not self.passed:
            self._before = self._compare(program, "the trace")

    def after(self, program: Program, item: Pass, changed: int) -> None:
        if not changed:
            return
        name = name_of(item)
        after = self._compare(program, name)
        if item.exactness is Exactness.EXACT:
            for now, was in zip(after, self._before, strict=True):
                for output in sorted(now.keys() & was.keys() - {"keys", "values"}):
                    if not _same(now[output], was[output]):
                        what = f"{name} is exact, but changed the step's output {output!r}"
                        raise VerificationError(what, where=name, remedy=_REMEDY)
        self._before = after

    def _compare(self, program: Program, name: str) -> list[Values]:
        """The outputs of a stage, which are the eager module's within what is allowed."""
        after = []
        for case, wanted in zip(self.inputs, self.wanted, strict=True):
            outputs = self._run(name, program, case)
            self._hold(name, outputs, wanted, program.shape)
            after.append(outputs)
            if program.stage is not Stage.TRACED:
                again = self._run(name, program, case, outputs)
                self._hold(f"{name} (rows of the block only)", again, wanted, program.shape)
        self.passed.append(name)
        return after

    def _run(self, name: str, program: Program, case: Case, state: Values | None = None) -> Values:
        try:
            return self.run(program, case, state)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            what = f"after {name} the program cannot be run: {str(error).partition(chr(10))[0]}"
            raise VerificationError(what, where=name, remedy=_REMEDY) from error

    def run(self, program: Program, case: Case, state: Values | None = None) -> Values:
        """The outputs of a stage over all rows; with `state`, of the block's rows over its keys."""
        with torch.no_grad():
            interpreter = torch.fx.Interpreter(program.module)
            results = interpreter.run(*self.arguments(program, case, state))
        return {o.name: r for o, r in zip(program.outputs, results, strict=True)}

    def arguments(self, program: Program, case: Case, state: Values | None = None) -> list[Tensor]:
        """What the program's placeholders stand for, in order."""
        shape = program.shape
        rows = None
        if state is not None:
            needed = torch.cat(
                (case.positions(), case.positions()[:1] - int(shape.shift))
            ).clamp_min(0)
            # In no order: a row does not know its neighbours.
            rows = torch.unique(needed).flip(0)
        known = step_inputs(case, shape, self.parameters, rows)
        out = []
        for item in program.inputs:
            like = value(program.placeholder(item.name))
            if item.kind == "weight":
                out.append(self._weight(program, item.name, like.dtype))
            elif item.kind == "constant":
                out.append(program.constants[item.name])
            elif item.name == "canvas":
                canvas = torch.zeros([int(d) for d in like.shape], dtype=torch.int64)
                canvas[0, : case.length] = case.ids
                out.append(canvas)
            elif item.kind == "state":
                zero = torch.zeros([int(d) for d in like.shape], dtype=like.dtype)
                kept = state is not None and item.name.startswith(("keys", "values"))
                out.append(state[item.name] if kept and state is not None else zero)
            else:
                out.append(known[item.name])
        return out

    def _weight(self, program: Program, name: str, dtype: torch.dtype) -> Tensor:
        recipe = program.recipes[name]
        if self._made.get(name, (None,))[0] != recipe:
            self._made[name] = recipe, recipe.read(self.read).to(dtype)
        return self._made[name][1]

    def _eager(self, case: Case, shape: StepShape) -> Values:
        """The eager step's outputs, and how far its choices are from the next best."""
        known = step_inputs(case, shape, self.parameters)
        live = (case.ids[case.positions()] == shape.mask_id)[None]
        with torch.no_grad():
            logits = logits_of(self.model(case.ids[None]))[0]
            clock = (known["temperature"], known["seed"], known["tick"], known["block_pos"])
            token, confidence, margin, _ = operators.CHOOSE(
                logits[known["choice_row"]], live, *clock, shape.mask_id
            )
        if not bool(logits.isfinite().all()):
            raise VerificationError(
                "the plain model's own logits are not finite on ordinary tokens",
                remedy="the weights are damaged, or too large for the dtype: --dtype float32",
            )
        return {"token": token, "confidence": confidence, "margin": margin, "live": live}

    def _hold(self, name: str, outputs: Values, wanted: Values, shape: StepShape) -> None:
        live = wanted["live"]
        got, want = outputs["confidence"][live], wanted["confidence"][live]
        error = float((got - want).norm() / want.norm())
        limit = TOLERANCE[shape.dtype]
        if not error <= limit:
            raise VerificationError(
                f"after {name} the confidences depart from the eager module's by {error:.1e} of their norm, "
                f"{limit:.0e} is allowed",
                where=name,
                remedy=_REMEDY,
            )
        sure = live & (wanted["margin"] > 2 * limit * wanted["confidence"].clamp_min(0))
        if bool((outputs["token"][sure] != wanted["token"][sure]).any()):
            what = f"after {name} the step chooses other tokens than the eager module, where it is sure"
            raise VerificationError(what, where=name, remedy=_REMEDY)
        if not name.endswith(")"):
            self.worst = max(self.worst, error)


class Recorded(torch.fx.Interpreter):
    """Runs a program and keeps every value that is a tensor."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.values: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n] = result
        return result


def distance(got: Tensor, wanted: Tensor) -> float:
    """How far two results are apart: of the norm for numbers, the share that differs for the rest."""
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return float((got != wanted).float().mean()) if wanted.numel() else 0.0
    finite = wanted.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    a, b = got[finite].double(), wanted[finite].double()
    # Rows that nothing computes are zero in both.
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if not torch.equal(a, b) else 0.0


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
