"""`--check`: run the program before and after each pass on example inputs, and compare by exactness."""

from __future__ import annotations

import torch
from torch import Tensor

from dcompile.errors import ContractError
from dcompile.ir.edit import value
from dcompile.ir.program import Exactness, Pass, Program
from dcompile.ir.weights import Item, Recipe, Rows, Source, Turn

ROWS = 24
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class Checker:
    """Observes: holds seeded random checkpoint tensors, and the outputs before the current pass."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def before(self, program: Program, item: Pass) -> None:
        if not self.outputs:
            self._invent(program)
            self.outputs = self._run(program)

    def after(self, program: Program, item: Pass, changed: int) -> None:
        """Raise ContractError where the outputs changed more than the pass says it may change them."""
        if changed:
            after = self._run(program)
            self._compare(program, item, after)
            self.outputs = after

    def _invent(self, program: Program) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, recipe in program.recipes.items():
            like = value(program.placeholder(name))
            self._fill(recipe, [int(d) for d in like.shape], like.dtype, generator)

    def _fill(
        self, recipe: Recipe, shape: list[int], dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        if isinstance(recipe, Source):
            if recipe.name not in self.tensors:
                scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
                drawn = torch.randn(shape, generator=generator) * scale
                self.tensors[recipe.name] = drawn.to(dtype)
            return
        if isinstance(recipe, (Item, Turn, Rows)):
            return  # made by a pass, of tensors that the traced program has
        for part in recipe.parts:
            self._fill(part, shape[1:], dtype, generator)

    def _run(self, program: Program) -> dict[str, Tensor]:
        shape = program.shape
        rows = min(ROWS, shape.positions)
        block = min(shape.block_length, rows)
        generator = torch.Generator().manual_seed(1)
        positions = torch.arange(rows)
        pos = torch.arange(rows - block, rows).expand(1, block)
        pad = shape.block_length - block
        pos = torch.cat((pos, pos[:, -1:].expand(1, pad)), 1) if pad else pos
        one = torch.ones(1, dtype=torch.int64)
        span = shape.model_block
        known: dict[str, Tensor] = {
            "row_seq": torch.zeros(rows, dtype=torch.int64),
            "row_pos": positions,
            "row_limit": torch.full((rows,), rows)
            if span is None
            else ((positions // span + 1) * span).clamp_max(rows),
            "block_seq": one * 0,
            "block_pos": pos,
            "choice_row": pos,
            "iteration": one * 0,
            "entered": one * block,
            "temperature": torch.zeros(1),
            "seed": one * 0,
            "tick": one * 0,
            "prompt_end": one * (rows - block),
            "full": one,
            "row_weight": torch.full((rows,), 0.3),
        }
        arguments = []
        for item in program.inputs:
            like = value(program.placeholder(item.name))
            if item.kind == "weight":
                made = program.recipes[item.name].read(self.tensors.__getitem__)
                arguments.append(made.to(like.dtype))
            elif item.kind == "constant":
                arguments.append(program.constants[item.name])
            elif item.name == "canvas":
                canvas = torch.randint(0, 3, [int(d) for d in like.shape], generator=generator)
                canvas[0, rows - block : rows] = shape.mask_id
                arguments.append(canvas)
            elif item.kind == "state":
                arguments.append(torch.zeros([int(d) for d in like.shape], dtype=like.dtype))
            else:
                arguments.append(known.get(item.name, torch.full((1,), 0.5)))
        with torch.no_grad():
            results = torch.fx.Interpreter(program.module).run(*arguments)
        names = [o.name for o in program.outputs]
        return {n: r for n, r in zip(names, results, strict=True) if n in ("canvas", "confidence")}

    def _compare(self, program: Program, item: Pass, after: dict[str, Tensor]) -> None:
        name = type(item).__name__
        if item.exactness is Exactness.EXACT:
            equal = all(torch.equal(after[k], v) for k, v in self.outputs.items())
            if not equal:
                raise ContractError(f"{name} is exact, but it changed the step's outputs")
            return
        if item.exactness is Exactness.APPROXIMATE:
            return  # another algorithm, which the user chose
        was, now = self.outputs["confidence"], after["confidence"]
        error = float((was - now).norm() / was.norm())
        if not error <= TOLERANCE[program.shape.dtype]:
            raise ContractError(f"{name} changed the confidences by {error:.1e} of their norm")
