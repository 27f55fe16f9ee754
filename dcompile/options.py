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


def _asked(default: Any, text: str, *, flag: str | None = None, shown: str | None = None) -> Any:
    """A field, what help says of it, and how it is spelled where its name does not say it."""
    return field(default=default, metadata={"help": text, "flag": flag, "metavar": shown})


@dataclass(frozen=True)
class Options:
    """Compile-time choices; None means what the model's family or the machine suggests."""

    target: str = _asked("auto", "auto (cpu), cpu, cuda, or cuda:sm_80,sm_90.")
    dtype: str = _asked("auto", "auto (as stored), float32, bfloat16 or float16.")
    max_length: int | None = _asked(None, "Positions a sequence: prompt and generated tokens.")
    batch: int = _asked(1, "Sequences in flight.")
    block_length: int | None = _asked(None, "Positions decoded together.")
    policy: str | None = _asked(None, "Which candidates commit: auto, a name, or file.py:name.")
    score: str | None = _asked(None, "steps: low_confidence, random, margin or entropy.")
    manager: str = _asked(
        "blockwise", "blockwise, canvas (all positions as one block) or pipelined (D2F)."
    )
    max_blocks: int | None = _asked(None, "pipelined: blocks of a sequence undecided at a time.")
    aligned: bool | None = _asked(
        None,
        "The first block begins at a multiple of its length.",
        flag="--aligned/--unaligned",
    )
    cache: str | None = _asked(
        None, "Rows recomputed: none, prefix, dual, vicinity, periodic, active or block."
    )
    look_back: int = _asked(16, "vicinity: rows before the block.")
    look_ahead: int = _asked(16, "vicinity: rows after it.")
    warmup: int = _asked(4, "vicinity: first iterations over all rows.")
    refresh_every: int = _asked(8, "periodic: iterations between refreshes.", shown="K")
    cross_block: bool = _asked(
        True,
        "block: store a block in the next one's first forward, or in one of its own.",
        flag="--cross-block/--no-cross-block",
    )
    smoothing: float | None = _asked(None, "Iteration smoothing: the mixture's largest weight.")
    moe_capacity: float | None = _asked(
        None, "An expert takes so many times its even share of a sequence's tokens."
    )
    moe_overflow: str | None = _asked(None, "What a token does beyond it: drop, or reroute.")
    expert_pool: int | None = _asked(None, "Experts that the tokens of a block choose from.")
    mask_id: int | None = _asked(None, "The mask token, where the checkpoint lacks it.")
    eos_ids: tuple[int, ...] | None = _asked(
        None, "Instead of the checkpoint's; repeatable.", flag="--eos-id"
    )
    check: bool = _asked(
        False, "Run the program before and after each pass, and compare.", flag="--check"
    )
    stop_after: str | None = _asked(None, "End the pipeline after this pass.", shown="PASS")
    skip: tuple[str, ...] = _asked((), "Leave a pass out; repeatable.", shown="PASS")
    threads: int | None = _asked(None, "CPU threads of the machine that will run it.")
    weights: str = _asked(
        "inside", "In the artifact, or in a folder beside it.", shown="inside|external"
    )

    def validate(self) -> None:
        """Raise OptionError where a value makes no sense."""
        # Here, so that the command line knows its options without loading the compiler.
        from dcompile.codegen.targets import parse_target

        for name in ("max_length", "batch", "block_length", "max_blocks", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise OptionError(f"{name} must be at least 1, not {number}")
        for name in ("look_back", "look_ahead", "warmup"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.weights not in ("inside", "external"):
            what = f"weights are inside or external, not {self.weights!r}"
            raise OptionError(what, remedy="--weights inside or external")
        if self.refresh_every < 1:
            raise OptionError(f"refresh_every must be at least 1, not {self.refresh_every}")
        self._validate_experts()
        if self.cache is not None and self.cache not in CACHES:
            raise OptionError(
                f"there is no cache policy named {self.cache!r}",
                remedy=f"one of {', '.join(CACHES)}",
            )
        if self.manager not in MANAGERS:
            raise OptionError(
                f"there is no manager named {self.manager!r}",
                remedy=f"one of {', '.join(MANAGERS)}",
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise OptionError(
                f"dtype {self.dtype!r} is not supported",
                remedy="auto, float32, bfloat16 or float16",
            )
        parse_target(self.target)
        if self.smoothing is not None and not 0 < self.smoothing <= 1:
            raise OptionError(
                f"smoothing must be above 0 and at most 1, not {self.smoothing}",
                remedy="--smoothing 0.3, as published",
            )

    def _validate_experts(self) -> None:
        if self.moe_capacity is not None and not 0 < self.moe_capacity < math.inf:
            raise OptionError(
                f"moe_capacity must be above 0, not {self.moe_capacity}", remedy="1.0 to 2.0"
            )
        if self.moe_overflow not in (None, "drop", "reroute"):
            raise OptionError(
                f"there is no moe_overflow {self.moe_overflow!r}", remedy="drop or reroute"
            )
        if self.moe_overflow is not None and self.moe_capacity is None:
            raise OptionError(
                "moe_overflow says what to do beyond a capacity, and there is none",
                remedy="--moe-capacity 1.5",
            )
        if self.expert_pool is not None and self.expert_pool < 1:
            raise OptionError(f"expert_pool must be at least 1, not {self.expert_pool}")

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
