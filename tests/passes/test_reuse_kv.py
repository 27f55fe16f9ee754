"""K/V reuse: any window of rows over a fresh cache equals the full forward's rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcompile.driver.pipeline import clean_up
from dcompile.errors import MixesPositions, UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.program import Program, Stage, StepShape
from dcompile.ir.weights import Source
from dcompile.passes.canonicalize import Canonicalize
from dcompile.passes.fold_constants import FoldConstants
from dcompile.passes.reuse_kv import ReuseKV
from dcompile.policies import find_policy
from dcompile.step.trace import Traced, trace

VOCAB, MASK, POSITIONS, BLOCK = 61, 60, 48, 4


class Model(nn.Module):
    """One drawn from a family: heads, groups, normed or not, tables or learned positions, mask."""

    def __init__(self, heads: int, groups: int, size: int, learned: bool, span: int | None) -> None:
        super().__init__()
        hidden = heads * size
        self.heads, self.groups, self.size, self.span = heads, groups, size, span
        self.embed = nn.Embedding(VOCAB, hidden)
        self.learned = nn.Embedding(POSITIONS, hidden) if learned else None
        self.q = nn.Linear(hidden, heads * size)
        self.k = nn.Linear(hidden, groups * size)
        self.v = nn.Linear(hidden, groups * size)
        self.o = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        at = torch.arange(length)
        x = self.embed(ids)
        x = x + (self.learned(at) if self.learned is not None else torch.sin(at[:, None] / 7.0))
        for _ in range(2):
            q, k, v = (
                p(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
                for p in (self.q, self.k, self.v)
            )
            mask = None
            if self.span is not None:
                mask = (at[None, :] // self.span) <= (at[:, None] // self.span)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + torch.tanh(self.o(a.transpose(1, 2).flatten(2)))
        return self.head(F.layer_norm(x, x.shape[-1:]))


def rewritten(model: nn.Module) -> Program:
    shape = StepShape(2, POSITIONS, BLOCK, MASK, torch.float32)
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    program = trace(model.eval(), Traced(shape, find_policy("threshold"), recipes))
    for item in (Canonicalize(), FoldConstants(), Canonicalize(), ReuseKV(), Canonicalize()):
        item(program)
        clean_up(program)
    return program


class Windowed:
    """Runs chosen rows of a rewritten program, keeping its caches; logits come out of `choose`."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program = program
        self.parameters = dict(model.named_parameters())
        shape = program.shape
        self.state = {
            i.name: torch.full(
                tuple(int(d) for d in program.placeholder(i.name).meta["val"].shape),
                0 if i.name == "canvas" else float("nan"),
                dtype=program.placeholder(i.name).meta["val"].dtype,
            )
            for i in program.inputs
            if i.kind == "state"
        }
        self.shape = shape

    def logits(self, ids: Tensor, first: int, last: int, slot: int) -> Tensor:
        """Logits of rows [first, last) of a sequence in `slot`, [rows, V]."""
        self.state["canvas"][slot, : len(ids)] = ids
        rows = torch.arange(first, last)
        span = self.program.shape.model_block
        limit = torch.full_like(rows, len(ids))
        if span is not None:
            limit = ((rows // span + 1) * span).clamp_max(len(ids))
        one = torch.zeros(1, dtype=torch.int64)
        choice = torch.arange(BLOCK)[None].clamp_max(len(rows) - 1)
        known = {
            "row_seq": torch.full_like(rows, slot),
            "row_pos": rows,
            "row_limit": limit,
            "block_seq": one + slot,
            "block_pos": torch.arange(BLOCK)[None],
            "choice_row": choice,
            "iteration": one,
            "entered": one,
            "temperature": torch.zeros(1),
            "seed": one,
            "tick": one,
            "threshold": torch.ones(1),
        }
        seen: list[Tensor] = []
        program = self.program

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                if n.target is operators.CHOOSE:
                    # Before the choice of rows: the logits of every row that ran.
                    chosen = n.args[0]
                    assert isinstance(chosen, torch.fx.Node)
                    source = chosen.args[0]
                    assert isinstance(source, torch.fx.Node)
                    seen.append(self.env[source])
                return super().run_node(n)

        arguments = []
        for item in program.inputs:
            if item.kind == "weight":
                arguments.append(program.recipes[item.name].read(self.parameters.__getitem__))
            elif item.kind == "constant":
                arguments.append(program.constants[item.name])
            else:
                arguments.append(
                    self.state[item.name] if item.kind == "state" else known[item.name]
                )
        with torch.no_grad():
            out = Watch(program.module, garbage_collect_values=False).run(*arguments)
        for output, tensor in zip(program.outputs, out, strict=True):
            if output.state is not None and output.state != "canvas":
                self.state[output.state] = tensor
        return seen[0].reshape(-1, VOCAB)


drawn = st.tuples(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.sampled_from([4, 8, 10]),
    st.booleans(),
    st.sampled_from([None, 1, 3, 4]),
    st.integers(0, 2**31),
)


@settings(max_examples=8, deadline=None)
@given(drawn, st.data())
def test_a_window_over_a_fresh_cache_is_the_full_forward(drawn: tuple, data: st.DataObject) -> None:  # type: ignore[type-arg]
    (heads, groups), size, learned, span, seed = drawn
    torch.manual_seed(seed)
    model = Model(heads, groups, size, learned, span)
    program = rewritten(model)
    assert program.stage is Stage.PLANNED and program.shape.model_block == span
    windowed = Windowed(program, model)
    for slot in (0, 1):
        length = data.draw(st.integers(4, POSITIONS), label="length")
        first = data.draw(st.integers(0, length - 1), label="first")
        last = data.draw(st.integers(first + 1, length), label="last")
        ids = torch.randint(0, VOCAB, (length,))
        with torch.no_grad():
            full = model(ids[None])[0]
        every = windowed.logits(ids, 0, length, slot)
        torch.testing.assert_close(every, full, rtol=1e-4, atol=1e-5)
        part = windowed.logits(ids, first, last, slot)
        torch.testing.assert_close(part, full[first:last], rtol=1e-4, atol=1e-5)


def test_stale_rows_are_kept_and_new_rows_seen() -> None:
    torch.manual_seed(0)
    model = Model(2, 1, 8, False, None)
    windowed = Windowed(rewritten(model), model)
    ids = torch.randint(0, VOCAB, (12,))
    before = windowed.logits(ids, 0, 12, 0)
    changed = ids.clone()
    changed[10] = (ids[10] + 1) % VOCAB
    stale = windowed.logits(changed, 0, 4, 0)
    torch.testing.assert_close(stale, before[:4], rtol=1e-5, atol=1e-6)
    windowed.logits(changed, 8, 12, 0)
    assert not torch.allclose(windowed.logits(changed, 0, 4, 0), before[:4])


def refuse(middle: Callable[[Tensor], Tensor]) -> str:
    class Odd(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(middle(self.embed(ids)))

    with pytest.raises((MixesPositions, UnsupportedModel)) as refused:
        rewritten(Odd(1, 1, 8, False, None))
    return str(refused.value)


def test_refusals_name_node_and_reason() -> None:
    assert "softmax" in refuse(lambda x: x.softmax(1))
    assert "flip" in refuse(lambda x: x.flip(1))
    assert "positions" in refuse(lambda x: x - x.amax(1, keepdim=True))
    assert "pair" in refuse(lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x)
    assert "merges" in refuse(
        lambda x: (
            x.reshape(1, -1, 4)
            .mean(-1, keepdim=True)
            .reshape(x.shape[0], -1, 2)
            .sum(-1, keepdim=True)
            + x
        )
    )


def test_leaves_a_program_without_attention() -> None:
    class Plain(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    program = rewritten(Plain(1, 1, 8, False, None))
    assert not [i for i in program.inputs if i.name.startswith("keys")]


def test_the_module_in_the_error_is_the_one_that_mixes(tmp_path: Path) -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    class Nested(Model):
        def __init__(self) -> None:
            super().__init__(1, 1, 8, False, None)
            self.mixer = Mixer()

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mixer(self.embed(ids)))

    with pytest.raises(MixesPositions, match="mixer: cumsum"):
        rewritten(Nested())
