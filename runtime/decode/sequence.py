"""A call of `generate`, the prompts that it serves, and what each of them yielded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from dcompile.runtime.decode.pipelined import Block, Pipeline

Ints = npt.NDArray[np.int64]
OnBlock = Callable[[int, list[int]], None]
"""Takes the index of a prompt and the tokens that its latest block generated."""
OnResult = Callable[[int, "Result"], None]
"""Takes the index of a prompt and its result, at once when it is there."""


@dataclass(frozen=True)
class Result:
    """What one prompt yielded."""

    tokens: list[int]
    """Generated ids before the first end of sequence."""
    all_tokens: list[int]
    """The ids of every generated position."""
    text: str | None
    """`tokens` as text; None where the artifact has no tokenizer."""
    forwards: int
    """Iterations that this prompt took part in."""
    tokens_per_forward: float
    """Positions decoded per iteration, filled-in ends of sequence not counted."""
    seconds: float
    tokens_per_second: float


@dataclass
class Served:
    """A prompt being served: its place in the batch and its own clock."""

    index: int
    prompt: int
    end: int
    """Where the generated positions end; the sequence itself may go on to a whole block."""
    total: int
    slot: int
    canvas: Ints
    limits: Ints
    seed: int
    block: Block
    pipeline: Pipeline | None = None
    """Where several blocks are decided at a time."""
    deciding: list[Block] = field(default_factory=list)
    """The blocks of the iteration that runs."""
    tick: int = 0
    previous: int | None = None
    storing: bool = False
    """The next iteration decides nothing: it stores the keys and values of a finished block."""
    decoded: int = 0
    began: float = field(default_factory=perf_counter)


@dataclass(frozen=True)
class Call:
    """One call of `generate`, checked."""

    prompts: list[list[int]]
    gen_length: int
    temperature: float
    seeds: list[int]
    early_stop: bool
    parameters: Mapping[str, float]
    on_block: OnBlock | None
    on_result: OnResult | None
