"""What is asked of a runner, checked: each way in which a request can be wrong has its words."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

from dcompile.errors import ArtifactError, OptionError, RequestError

_LARGEST_EXACT = 1 << 24
"""Parameters travel as float32, which holds no larger count exactly."""
_LARGEST = float(np.finfo(np.float32).max)
_GREEDY_BELOW = 1e-30
"""A logit divided by less may overflow, and below 1.2e-38 float32 has no normal numbers to divide by;
the noise is too small by far to change a choice there."""


@dataclass(frozen=True)
class Request:
    """What is asked for one prompt; with the artifact, all that its tokens depend on."""

    prompt: Sequence[int]
    gen_length: int
    temperature: float = 0.0
    seed: int = 0
    early_stop: bool = True
    """Stop after the first block with an end of sequence."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Of the compiled policy, in place of its defaults."""
    confidences: bool = False
    """Whether committed tokens come with theirs: the host then looks after each iteration."""


@dataclass(frozen=True)
class Limits:
    """What the model and the compiled plan allow."""

    vocab_size: int
    mask_id: int
    eos_ids: frozenset[int]
    shift: bool
    span: int | None
    """Length of the blocks of a block-causal mask; None where attention is bidirectional."""
    block_length: int
    aligned: bool
    """Whether the first block begins at a multiple of the block length."""
    canvas: bool
    """Whether all generated positions are one block."""
    pipelined: bool
    """Whether a block may begin before the one before it is done."""
    blocks: int
    """Blocks of a sequence that may be undecided at a time."""
    max_length: int
    batch: int
    parameters: Mapping[str, float]

    @staticmethod
    def read(manifest: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> Limits:
        model, policy = manifest["model"], manifest["policy"]
        options = manifest.get("options", {})
        try:
            limits = Limits(
                vocab_size=int(model["vocab_size"]),
                mask_id=int(model["mask_id"]),
                eos_ids=frozenset(int(token) for token in model["eos_ids"]),
                shift=bool(model["shift"]),
                span=None if model["block_length"] is None else int(model["block_length"]),
                block_length=sizes["n"],
                aligned=_aligned(options, model["block_length"]),
                canvas=options.get("manager") == "canvas",
                pipelined=options.get("manager") == "pipelined",
                blocks=sizes.get("blocks", 1),
                max_length=sizes["L"],
                batch=sizes["N"],
                parameters={k: float(v) for k, v in policy["parameters"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"the manifest's description of the model cannot be read ({error!r})"
            raise ArtifactError(what, where=where, remedy="compile the model again") from error
        n, span = limits.block_length, limits.span
        if span is not None and (span < 1 or (n % span and span % n)):
            what = f"decoding blocks of {n} do not fit the model's attention blocks of {span}"
            remedy = f"compile with --block-length {span}"
            raise OptionError(what, where="block_length", remedy=remedy)
        if limits.pipelined and (span is None or n % span):
            what = "pipelined blocks need a block-causal mask, whose blocks fit into theirs"
            raise OptionError(what, where="manager", remedy="use blockwise")
        return limits

    @property
    def unit(self) -> int:
        """Sequences are whole runs of so many positions, where blocks are aligned."""
        return max(self.block_length, self.span or 1) if self.aligned else 1

    def begin(self, prompt: int) -> int:
        """Where the first block starts."""
        return prompt - prompt % self.block_length if self.aligned else prompt

    def total(self, prompt: int, gen_length: int) -> int:
        """How many positions a sequence has; whole blocks where they are aligned."""
        length = prompt + gen_length
        return length + -length % self.unit

    def rounded(self, gen_length: int) -> int:
        """So many positions in whole blocks, where the first one begins behind the prompt."""
        return gen_length if self.aligned else gen_length + -gen_length % self.block_length

    def default_length(self, prompt: int, wanted: int) -> int:
        """About so many positions to generate, as far as the artifact has room after a prompt."""
        n = self.block_length
        if self.aligned:
            room = self.max_length // self.unit * self.unit - prompt
            return max(min(wanted, room), 1)
        if self.canvas:
            return n
        return max(min(wanted + -wanted % n, (self.max_length - prompt) // n * n), n)

    def settle(self, asked: Request, where: str = "prompt") -> Request:
        """The request with every parameter; raises RequestError where it cannot be served."""
        ids = token_ids(asked.prompt)
        settled = replace(self.settings(asked), prompt=ids)
        self.check_prompt(ids, settled.gen_length, where)
        return settled

    def settings(self, asked: Request) -> Request:
        """As `settle`, whatever the prompt is."""
        gen_length, seed = _whole(asked.gen_length), _whole(asked.seed)
        self.check_length(gen_length)
        check_seed(seed)
        return replace(
            asked,
            gen_length=gen_length,
            seed=seed,
            temperature=temperature_of(asked.temperature),
            parameters=self.parameters_of(asked.parameters),
        )

    def check_length(self, gen_length: int) -> None:
        if type(gen_length) is not int or gen_length < 1:
            raise RequestError(f"{gen_length!r} tokens cannot be generated", where="gen_length")
        n = self.block_length
        if self.canvas and gen_length != n:
            what = f"the compiled canvas has {n} positions, not {gen_length}"
            remedy = f"use {n}, or compile with --block-length {gen_length}"
            raise RequestError(what, where="gen_length", remedy=remedy)

    def check_prompt(self, prompt: Sequence[int], gen_length: int, where: str) -> None:
        for position, token in enumerate(prompt):
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError(f"{token!r} is no token id", where=f"{where}[{position}]")
            if not 0 <= token < self.vocab_size:
                what = f"token id {token} is outside the vocabulary of {self.vocab_size}"
                raise RequestError(what, where=f"{where}[{position}]")
            if token == self.mask_id:
                what = f"token id {token} is the mask id, which marks positions to generate"
                raise RequestError(what, where=f"{where}[{position}]", remedy="leave it out")
        total = self.total(len(prompt), self.rounded(gen_length))
        if total > self.max_length:
            what = (
                f"a prompt of {len(prompt)} tokens and {gen_length} to generate need {total} "
                f"positions; the artifact has {self.max_length}"
            )
            remedy = f"shorten it, or compile with --max-length {total}"
            raise RequestError(what, where=where, remedy=remedy)

    def parameters_of(self, given: Mapping[str, Any]) -> dict[str, float]:
        """The policy's parameters, with the given ones in place of the defaults."""
        known = ", ".join(self.parameters) or "none"
        for name in given:
            if name not in self.parameters:
                what = "the compiled policy has no such parameter"
                raise RequestError(what, where=name, remedy=f"it has: {known}")
        return {**self.parameters, **{name: _parameter(name, v) for name, v in given.items()}}


def token_ids(prompt: Any) -> list[Any]:
    """A prompt's ids as Python's numbers, of a list or of an array of any library.

    An array may have leading axes of one row.  What is no whole number stays, for
    `Limits.check_prompt` to name it; raises RequestError where there is no sequence.
    """
    if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview):
        prompt = prompt.tolist()
        while isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
            prompt = prompt[0]
    return [_whole(token) for token in sequence(prompt, "token ids", "a text, or a list of ids")]


def sequence(given: Any, of: str, remedy: str) -> list[Any]:
    """What is given in an order of its own; raises RequestError for bytes, mappings, sets, numbers."""
    if isinstance(given, (str, bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(
        given, Iterable
    ):
        kind = type(given).__name__
        what = f"a{'n' * (kind[0] in 'aeiou')} {kind} is no sequence of {of}"
        raise RequestError(what, remedy=f"give {remedy}")
    return list(given)


def _whole(value: Any) -> Any:
    """A whole number of any library as Python's; anything else as it is, a truth value too."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _real(value: Any) -> float:
    """A number of any library as Python's; NaN, which is in no range, for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _aligned(options: Mapping[str, Any], span: int | None) -> bool:
    """As compiled; otherwise as the model's attention mask asks."""
    aligned = options.get("aligned")
    return span is not None if aligned is None else bool(aligned)


def _parameter(name: str, given: Any) -> float:
    def out(rule: str) -> RequestError:
        return RequestError(f"{given!r} is out of range", where=name, remedy=f"use {rule}")

    value = _real(given)
    if not abs(value) <= _LARGEST:
        raise out("a number")
    if name == "threshold_edit":
        if not 0 <= value <= 1:
            raise out("0 to 1")
    elif name.startswith(("threshold", "tau")):
        if not 0 < value <= 1:
            raise out("more than 0 and at most 1")
    elif name.endswith("steps"):
        least = 1 if name == "steps" else 0
        if value != int(value) or not least <= value < _LARGEST_EXACT:
            raise out(f"a whole number from {least} on")
    elif value < 0:
        raise out("0 or more")
    return value


def temperature_of(given: Any) -> float:
    """What the kernels are told; 0, which is greedy, where noise would change no choice."""
    value = _real(given)
    if not 0 <= value <= _LARGEST:
        raise RequestError(
            f"{given!r} is out of range",
            where="temperature",
            remedy=f"use 0 or more, at most {_LARGEST:.4g}",
        )
    return value if value >= _GREEDY_BELOW else 0.0


def check_seed(value: Any) -> None:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        remedy = "use a whole number of at most 64 bits"
        raise RequestError(f"{value!r} is out of range", where="seed", remedy=remedy)


def stream(seed: int, repeat: int) -> int:
    """The seed of a prompt that occurs for the `repeat`-th time (from 0) in one call.

    The first takes the seed itself, so what a prompt yields does not depend on the prompts beside
    it; another sample of the same prompt is another stream (splitmix64).
    """
    if repeat == 0:
        return seed
    x = (seed + repeat * 0x9E3779B97F4A7C15) % (1 << 64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x
