"""Read gated feed-forward networks, and how each expert's weights lie in the model's, off a formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.weights import Concat, Item, Recipe, Rows, Stack, Turn
from dcompile.passes.moe.algebra import Expr, Fn, Guard, NotProven, Product, Ref, expand, uses
from dcompile.passes.moe.terms import Chosen, Const, Shifted, Term, Var

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class View:
    """A matrix [rows, columns], or a vector [rows], within a weight.

    `expert`: the place along the weight's first axis, -1 where each expert has its own, None where the
    weight is one expert's.
    """

    node: Node
    expert: int | None
    start: int
    rows: int
    turned: bool = False  # the columns' axis comes first

    def recipe(self, program: Program, expert: int) -> Recipe:
        made = program.recipes[self.node.name]
        if self.expert is not None:
            at = expert if self.expert < 0 else self.expert
            # Of a stack only the one part is ever read.
            made = made.parts[at] if isinstance(made, Stack) else Item(made, at)
        if self.turned:
            made = Turn(made)
        whole = value(self.node).shape[-1 if self.turned or self.is_vector() else -2]
        return made if self.rows == whole else Rows(made, self.start, self.start + self.rows)

    def is_vector(self) -> bool:
        return value(self.node).dim() == (1 if self.expert is None else 2)


@dataclass(frozen=True)
class Expert:
    """down(act(gate x + gate_bias) * (up x + up_bias)) + down_bias"""

    x: Ref
    activation: str
    gate: View
    up: View
    down: View
    gate_bias: View | None = None
    up_bias: View | None = None
    down_bias: View | None = None


@dataclass(frozen=True)
class Weighted:
    """An expert's share of the output: what multiplies it, by the slot that chose it."""

    expert: Expert
    number: float
    factors: frozenset[tuple[Expr, int]]  # and how often each


def read_expert(
    program: Program,
    products: Sequence[Product],
    choice: Chosen,
    out: Var,
    known: tuple[Guard, ...],
) -> Weighted:
    """The network whose terms, multiplied out, are `products`; NotProven where they are of no such one."""
    reader = _Terms(program, choice, out, known)
    found = _Found()
    shares: set[tuple[float, frozenset[tuple[Expr, int]]]] = set()
    for product in products:
        used = _sort_in(reader, product, found)
        left = list(product.factors)
        for factor in used:
            left.remove(factor)
        shares.add((product.number, frozenset(Counter(left).items())))
    if found.main is None or len(found.acts) != 1 or len(found.downs) != 1:
        raise NotProven(UNKNOWN)
    if len(shares) != 1:
        raise NotProven("an expert's bias is not weighted as its output is")
    expert = _assemble(reader, found)
    ((number, factors),) = shares
    return Weighted(expert, number, factors)


UNKNOWN = "an expert is not down(act(gate x) * up x)"


@dataclass
class _Found:
    """What an expert's products have shown so far."""

    main: tuple[View, Ref, Var] | None = None  # up projection, its input, the hidden index
    acts: set[Fn] = field(default_factory=set)
    downs: set[View] = field(default_factory=set)
    up_bias: View | None = None
    down_bias: View | None = None


def _sort_in(reader: _Terms, product: Product, found: _Found) -> list[Expr]:
    """Note what one product says of the expert; return the factors that are the expert's."""
    inner = [v for v in product.over if v != reader.choice.place[-1]]
    weights = reader.weights(product.factors)
    acts = [f for f in product.factors if isinstance(f, Fn) and f.name in ACTIVATIONS]
    if not acts:
        if len(weights) != 1 or inner or found.down_bias is not None:
            raise NotProven(UNKNOWN)
        found.down_bias = reader.vector(weights[0], reader.out)
        return [weights[0]]
    hidden = [v for v in inner if uses(acts[0], v)]
    down = [w for w in weights if uses(w, reader.out)]
    up = [w for w in weights if not uses(w, reader.out)]
    if len(acts) > 1 or len(hidden) != 1 or len(down) != 1 or len(up) != 1:
        raise NotProven(UNKNOWN)
    f = hidden[0]
    found.acts.add(acts[0])
    found.downs.add(reader.matrix(down[0], reader.out, f))
    columns = [v for v in inner if v != f]
    used: list[Expr] = [acts[0], down[0], up[0]]
    if columns and found.main is None:
        view, x = reader.projection(product.factors, up[0], f, columns)
        found.main = (view, x, f)
        used.append(x)
    elif not columns and found.up_bias is None:
        found.up_bias = reader.vector(up[0], f)
    else:
        raise NotProven("an expert has two up projections")
    return used


def _assemble(reader: _Terms, found: _Found) -> Expert:
    assert found.main is not None
    up, x, f = found.main
    (act,), (down,) = found.acts, found.downs
    gate, gate_bias, gate_x = reader.gate(act, f)
    if gate_x.node is not x.node:
        raise NotProven("gate and up projections do not read the same value")
    if (gate_bias is None) != (found.up_bias is None):
        raise NotProven("only one of the gate and up projections has a bias")
    biases = gate_bias, found.up_bias, found.down_bias
    return Expert(x, act.name, gate, up, down, *biases)


@dataclass(frozen=True)
class _Terms:
    """Finds matrices and vectors among the factors of an expert's products."""

    program: Program
    choice: Chosen
    out: Var
    known: tuple[Guard, ...]

    def weights(self, factors: Sequence[Expr]) -> list[Ref]:
        held = self.program.recipes
        return [f for f in factors if isinstance(f, Ref) and f.node.name in held]

    def gate(self, act: Fn, f: Var) -> tuple[View, View | None, Ref]:
        bias: View | None = None
        found: tuple[View, Ref] | None = None
        for product in expand(act.args[0], self.known):
            weights = self.weights(product.factors)
            if product.number != 1.0 or len(weights) != 1:
                raise NotProven("the gate is not a product of its input and a weight")
            if len(product.factors) == 1 and not product.over and bias is None:
                bias = self.vector(weights[0], f)
            elif found is None and len(product.factors) == 2:
                found = self.projection(product.factors, weights[0], f, product.over)
            else:
                raise NotProven("the gate is not a product of its input and a weight")
        if found is None:
            raise NotProven("the gate is not a product of its input and a weight")
        return found[0], bias, found[1]

    def projection(
        self, factors: Sequence[Expr], weight: Ref, row: Var, columns: Sequence[Var]
    ) -> tuple[View, Ref]:
        if len(columns) != 1:
            raise NotProven("a projection adds up over more than its input's features")
        (column,) = columns
        xs = [x for x in factors if isinstance(x, Ref) and x is not weight and uses(x, column)]
        if len(xs) != 1 or xs[0].index[-1] != column:
            raise NotProven("what the experts read is not one value of all features")
        x = xs[0]
        if int(value(x.node).shape[-1]) != column.size:
            raise NotProven("the experts read a part of the features")
        if any(uses(f, column) for f in factors if f is not weight and f is not x):
            raise NotProven("what the experts read is not one value of all features")
        return self.matrix(weight, row, column), x

    def matrix(self, ref: Ref, row: Var, column: Var) -> View:
        view, axes = self._view(ref, row, 2)
        (other,) = [i for i in axes if not _is_over(ref.index[i], row)]
        if ref.index[other] != column or int(value(ref.node).shape[other]) != column.size:
            raise NotProven(f"{ref.node.name} is not used as a matrix of whole columns")
        (mine,) = [i for i in axes if i != other]
        return replace(view, turned=mine > other)

    def vector(self, ref: Ref, row: Var) -> View:
        return self._view(ref, row, 1)[0]

    def _view(self, ref: Ref, row: Var, rank: int) -> tuple[View, list[int]]:
        """The weight's part, and its axes without the experts'."""
        axes, expert = list(range(len(ref.index))), None
        first = ref.index[0]
        if len(axes) == rank + 1 and (isinstance(first, Const) or first == self.choice):
            expert = first.value if isinstance(first, Const) else -1
            axes = axes[1:]
        if len(axes) != rank or not any(_is_over(ref.index[i], row) for i in axes):
            raise NotProven(f"{ref.node.name} is not indexed as an expert's weight")
        if expert == -1 and int(value(ref.node).shape[0]) != self.choice.size:
            raise NotProven(
                f"{ref.node.name} holds more or fewer experts than the router chooses from"
            )
        (term,) = [ref.index[i] for i in axes if _is_over(ref.index[i], row)]
        start = term.by if isinstance(term, Shifted) else 0
        return View(ref.node, expert, start, row.size), axes


def _is_over(term: Term, var: Var) -> bool:
    return term == var or (isinstance(term, Shifted) and term.of == var)


def stacked(program: Program, views: Sequence[Sequence[View]]) -> Recipe | Node:
    """[E, rows, ..] of each expert's parts joined, made expert by expert; the weight itself if it is that."""
    first, *rest = views[0]
    nodes = {v.node for parts in views for v in parts}
    if len(nodes) == 1 and all(_natural(v, e) for e, parts in enumerate(views) for v in parts):
        at = 0
        for part in (first, *rest):
            if part.start != at:
                break
            at += part.rows
        else:
            if at == int(value(first.node).shape[1]) and len(views) == int(
                value(first.node).shape[0]
            ):
                return first.node
    each: list[Recipe] = []
    for e, parts in enumerate(views):
        made = tuple(v.recipe(program, e) for v in parts)
        each.append(made[0] if len(made) == 1 else Concat(made))
    return Stack(tuple(each))


def _natural(view: View, expert: int) -> bool:
    return view.expert in (-1, expert) and not view.turned
