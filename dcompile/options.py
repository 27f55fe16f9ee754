"""What a user decides when compiling; recorded in the artifact."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, get_args, get_origin, get_type_hints

from dcompile.errors import ArtifactError, OptionError

CACHES = ("none", "prefix", "dual", "vicinity", "periodic", "active", "block")
MANAGERS = ("blockwise", "canvas", "pipelined")


def _asked(
    default: Any,
    panel: str,
    text: str,
    *,
    unset: str | None = None,
    flag: str | None = None,
    shown: str | None = None,
) -> Any:
    """A field and what help says of it: its panel, its text, and what is done where it is None.

    `flag` is how it is spelled and `shown` how its value is, where its name does not say it.
    """
    told = {"panel": panel, "help": text, "unset": unset, "flag": flag, "metavar": shown}
    return field(default=default, metadata=told)


@dataclass(frozen=True)
class Options:
    """Compile-time choices; None means what the model's family or the machine suggests."""

    target: str = _asked(
        "auto", "Machine", "What to compile for: auto (the CPU), cpu, cuda, or cuda:sm_80,sm_90."
    )
    dtype: str = _asked(
        "auto",
        "Model",
        "Type of weights and arithmetic: auto (as the checkpoint stores them), float32, bfloat16 or "
        "float16.",
    )
    max_length: int | None = _asked(
        None,
        "Model",
        "Most positions of a sequence, its prompt and the generated ones together.",
        unset="the model's, at most 2048",
    )
    batch: int = _asked(1, "Machine", "Sequences that are generated at the same time.")
    block_length: int | None = _asked(
        None,
        "Decoding",
        "Positions of a block, which is decided before the next one begins; with --manager canvas, "
        "positions to generate.",
        unset="the model's; 32 where it has none",
    )
    policy: str | None = _asked(
        None,
        "Decoding",
        "Which of the predicted tokens a forward keeps: auto, a policy's name, or your own as "
        "file.py:name.",
        unset="auto, the model family's own",
    )
    score: str | None = _asked(
        None,
        "Decoding",
        "What --policy steps ranks positions by: low_confidence, random, margin or entropy.",
        unset="low_confidence",
    )
    manager: str = _asked(
        "blockwise",
        "Decoding",
        "Which positions are decided together: blockwise (one block after the other), canvas (all) "
        "or pipelined (several blocks at a time, D2F).",
    )
    max_blocks: int | None = _asked(
        None,
        "Decoding",
        "With --manager pipelined: most blocks of a sequence that are undecided at a time.",
        unset="all",
    )
    aligned: bool | None = _asked(
        None,
        "Decoding",
        "Begin the first block at a multiple of the block length, or right after the prompt.",
        unset="aligned where the model's attention has blocks",
        flag="--aligned/--unaligned",
    )
    cache: str | None = _asked(
        None,
        "Cache",
        "Which rows a forward computes; the others keep the keys and values that they had. none "
        "(computes all), prefix, dual, vicinity, periodic, active or block.",
        unset="the model family's, else none",
    )
    look_back: int = _asked(
        16, "Cache", "With --cache vicinity: rows before the block that are computed with it."
    )
    look_ahead: int = _asked(
        16, "Cache", "With --cache vicinity: rows after the block that are computed with it."
    )
    warmup: int = _asked(
        4, "Cache", "With --cache vicinity: a request's first forwards, which compute all rows."
    )
    refresh_every: int = _asked(
        8,
        "Cache",
        "With --cache periodic: every K-th forward of a block computes all rows.",
        shown="K",
    )
    cross_block: bool = _asked(
        True,
        "Cache",
        "With --cache block: a finished block's keys and values are computed in the first forward of "
        "the next block, or in a forward of their own.",
        flag="--cross-block/--no-cross-block",
    )
    smoothing: float | None = _asked(
        None,
        "Decoding",
        "Embed a position that stays masked as the mask plus this share, at most, of the tokens "
        "predicted there. Published: 0.3.",
        unset="off",
    )
    moe_capacity: float | None = _asked(
        None,
        "Experts",
        "Limit how many of a sequence's tokens an expert takes: 1.5 is half more than if they were "
        "spread evenly over the experts.",
        unset="no limit",
    )
    moe_overflow: str | None = _asked(
        None,
        "Experts",
        "What a token does that a full expert does not take: drop (do without that expert) or "
        "reroute (to its next best one).",
        unset="drop",
    )
    expert_pool: int | None = _asked(
        None,
        "Experts",
        "Let the tokens of a block choose among this many experts only, those that it scores highest.",
        unset="all",
    )
    mask_id: int | None = _asked(
        None,
        "Model",
        "Token id of the mask, for a checkpoint that does not say it.",
        unset="the checkpoint's",
    )
    eos_ids: tuple[int, ...] | None = _asked(
        None,
        "Model",
        "Token id that ends a text, in place of the checkpoint's; may be given several times.",
        unset="the checkpoint's",
        flag="--eos-id",
    )
    check: bool = _asked(
        False,
        "Debugging",
        "Run the program before and after each pass, and compare the results.",
        flag="--check",
    )
    stop_after: str | None = _asked(
        None, "Debugging", "Run the passes up to this one only.", unset="all passes", shown="PASS"
    )
    skip: tuple[str, ...] = _asked(
        (),
        "Debugging",
        "Leave this pass out; may be given several times.",
        unset="none",
        shown="PASS",
    )
    threads: int | None = _asked(
        None,
        "Machine",
        "CPU threads that a run of the artifact takes where it asks for no other number.",
        unset="every core; 1 for a small model",
    )
    weights: str = _asked(
        "inside",
        "Machine",
        "Where the weights go: inside the artifact, or external, in a folder beside it.",
        shown="inside|external",
    )

    def validate(self) -> None:
        """Raise OptionError, with the option's name as its place, where a value makes no sense."""
        # Here, so that the command line knows its options without loading the compiler.
        from dcompile.codegen.targets import parse_target

        for name in ("max_length", "batch", "block_length", "max_blocks", "threads"):
            self._check_least(name, 1)
        for name in ("look_back", "look_ahead", "warmup"):
            self._check_least(name, 0)
        self._check_least("refresh_every", 1)
        self._check_least("expert_pool", 1)
        self._check_choice("weights", ("inside", "external"))
        self._check_choice("cache", CACHES)
        self._check_choice("manager", MANAGERS)
        self._check_choice("dtype", ("auto", "float32", "bfloat16", "float16"))
        self._check_choice("moe_overflow", ("drop", "reroute"))
        if self.moe_capacity is not None and not 0 < self.moe_capacity < math.inf:
            raise self._out_of_range("moe_capacity", "more than 0, such as 1.5")
        if self.moe_overflow is not None and self.moe_capacity is None:
            what = "what happens beyond a capacity is said, and there is no capacity"
            raise OptionError(what, where="moe_overflow", remedy="--moe-capacity 1.5")
        if self.smoothing is not None and not 0 < self.smoothing <= 1:
            raise self._out_of_range("smoothing", "more than 0 and at most 1: 0.3 as published")
        parse_target(self.target)

    def _check_least(self, name: str, least: int) -> None:
        number = getattr(self, name)
        if number is not None and number < least:
            raise self._out_of_range(name, f"{least} or more")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value is not None and value not in choices:
            remedy = f"use one of {', '.join(choices)}"
            raise OptionError(f"there is no {value!r}", where=name, remedy=remedy)

    def _out_of_range(self, name: str, rule: str) -> OptionError:
        what = f"{getattr(self, name)!r} is out of range"
        return OptionError(what, where=name, remedy=f"use {rule}")

    def record(self) -> dict[str, object]:
        """As data for the manifest, without what only steers the compiler."""
        steering = {"check", "stop_after", "skip", "weights"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in steering}

    def changed(self, **changes: object) -> Self:
        """A copy with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


def recorded_options(recorded: Mapping[str, Any], where: str) -> Options:
    """The options that an artifact was compiled with, as its manifest records them.

    Raises ArtifactError where a value is of another kind; names of other versions are left out.
    """
    known = {f.name: recorded[f.name] for f in fields(Options) if f.name in recorded}
    for name in ("eos_ids", "skip"):
        if isinstance(known.get(name), list):
            known[name] = tuple(known[name])
    known["target"] = "auto"
    for name, kind in get_type_hints(Options).items():
        if name in known and not _is_of(known[name], kind):
            what = f"the artifact's option {name} is {known[name]!r:.80}, which is no {kind}"
            raise ArtifactError(what, where=where, remedy="compile the model again")
    return Options(**known)


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a field's type: a plain type, a tuple of one, or a union of such."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, parts[0]) for item in value)
    if parts:
        return any(_is_of(value, part) for part in parts)
    return type(value) is kind or (kind is float and type(value) is int)


_NAMES = frozenset(f.name for f in fields(Options))


class WatchedOptions(Options):
    """Options that remember which of them anyone read; copies remember together.

    Checking, copying and recording them is no reading.
    """

    reads: set[str]

    @classmethod
    def of(cls, options: Options, reads: set[str] | None = None) -> Self:
        values = {name: object.__getattribute__(options, name) for name in _NAMES}
        out = cls(**values)
        object.__setattr__(out, "reads", set() if reads is None else reads)
        return out

    def __getattribute__(self, name: str) -> Any:
        if name in _NAMES:
            self.reads.add(name)
        return object.__getattribute__(self, name)

    def plain(self) -> Options:
        return Options(**{name: object.__getattribute__(self, name) for name in _NAMES})

    def validate(self) -> None:
        self.plain().validate()

    def record(self) -> dict[str, object]:
        return self.plain().record()

    def changed(self, **changes: object) -> Self:
        return self.of(self.plain().changed(**changes), self.reads)

    @property
    def unread(self) -> list[str]:
        """What nobody asked for so far."""
        return sorted(_NAMES - self.reads)


def environment() -> tuple[str | None, str | None]:
    """The two variables we read: DCOMPILE_STOP_AFTER and DCOMPILE_LOG."""
    return os.environ.get("DCOMPILE_STOP_AFTER"), os.environ.get("DCOMPILE_LOG")
