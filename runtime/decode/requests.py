"""What is asked of a runner, checked: each way in which a request can be wrong has its words."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dcompile.errors import ArtifactError, OptionError, RequestError

_LARGEST_EXACT = 1 << 24
"""Parameters travel as float32, which holds no larger count exactly."""


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
        self.check_prompt(ids, asked.gen_length, where)
        return settled

    def settings(self, asked: Request) -> Request:
        """As `settle`, whatever the prompt is."""
        self.check_length(asked.gen_length)
        check_temperature(asked.temperature)
        check_seed(asked.seed)
        return replace(asked, parameters=self.parameters_of(asked.parameters))

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
        for name, value in given.items():
            if name not in self.parameters:
                what = "the compiled policy has no such parameter"
                raise RequestError(what, where=name, remedy=f"it has: {known}")
            _check_parameter(name, value)
        return {**self.parameters, **{name: float(value) for name, value in given.items()}}


def token_ids(prompt: Any) -> list[Any]:
    """A prompt's ids as Python's numbers, of a list or of an array of any library.

    What is no whole number stays, for `Limits.check_prompt` to name it.
    """
    if isinstance(prompt, (bytes, bytearray, Mapping)):
        what = f"a {type(prompt).__name__} is no sequence of token ids"
        raise RequestError(what, remedy="give a text, or a list of ids")
    if hasattr(prompt, "tolist"):
        return np.asarray(prompt.tolist()).reshape(-1).tolist()
    return [_whole(token) for token in prompt]


def _whole(token: Any) -> Any:
    try:
        return token if isinstance(token, bool) else operator.index(token)
    except TypeError:
        return token


def _aligned(options: Mapping[str, Any], span: int | None) -> bool:
    """As compiled; otherwise as the model's attention mask asks."""
    aligned = options.get("aligned")
    return span is not None if aligned is None else bool(aligned)


def _check_parameter(name: str, value: Any) -> None:
    def out(rule: str) -> RequestError:
        return RequestError(f"{value!r} is out of range", where=name, remedy=f"use {rule}")

    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
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


def check_temperature(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise RequestError(
            f"{value!r} is out of range", where="temperature", remedy="use 0 or more"
        )


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
