"""What the compiler needs to know of any model, and how a config's keys are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dcompile.errors import ConfigError
from dcompile.frontends.layers import Decoder
from dcompile.ir.weights import Recipe, Source, Stack

log = logging.getLogger(__name__)

COMPUTED = "the only case that this model's definition computes"


@dataclass(frozen=True)
class Defaults:
    """How a family decodes where the user says nothing."""

    block_length: int = 32
    cache: str = "none"
    policy: str = "threshold"
    threshold: float | None = None  # as published; None leaves each policy its own
    tuned_for: tuple[str, ...] = ("threshold",)  # the policies that `threshold` reaches, no other

    def parameters(self, policy: str) -> dict[str, float]:
        """What a policy's own defaults give way to."""
        if self.threshold is None or policy not in self.tuned_for:
            return {}
        return {"threshold": self.threshold}


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a model that stages after the frontend read."""

    family: str  # "llada_moe"
    vocab_size: int  # rows of the vocabulary projection
    mask_id: int
    eos_ids: tuple[int, ...]
    max_positions: int | None  # None where nothing in the model bounds it
    block_length: int | None  # of a block-causal attention mask; None where it is bidirectional
    shift: bool  # token i is predicted by the logits at i - 1
    dtype: torch.dtype  # of the checkpoint
    layer_kinds: tuple[str, ...]  # one a layer; layers of one kind have the same graph
    defaults: Defaults


@dataclass(frozen=True)
class Definition:
    """What a family's file makes of a config: the model's facts, its module, its tensors' names."""

    family: str
    vocab_size: int
    max_positions: int | None
    layer_kinds: tuple[str, ...]
    defaults: Defaults
    build: Callable[[Sequence[int], torch.dtype], Decoder]  # the named layers, in order
    rename: Callable[[str], str]  # a parameter's name -> the name of its checkpoint tensor
    num_experts: int = 0
    block_length: int | None = None
    shift: bool = False
    tied: bool = False  # the vocabulary projection is the embedding table

    def recipes(self, parameters: Sequence[str]) -> dict[str, Recipe]:
        """How each of the full module's parameters is made from checkpoint tensors."""
        return {name: self._recipe(name) for name in parameters}

    def _recipe(self, name: str) -> Recipe:
        if name == "lm_head.weight" and self.tied:
            return Source(self.rename("embed_tokens.weight"))
        block, experts, projection = name.partition(".experts.")
        if not experts:
            return Source(self.rename(name))
        each = (f"{block}.experts.{e}.{projection}.weight" for e in range(self.num_experts))
        return Stack(tuple(Source(self.rename(part)) for part in each))


@dataclass(frozen=True)
class Config:
    """A model's config with the file that it came from; every reader names key, file and need.

    It remembers which keys were asked for, since a key that nobody asks for may mean something.
    """

    values: Mapping[str, object]
    file: str
    block_length: int | None = None  # the user's, for a block-causal mask that no key describes
    asked: set[str] = field(default_factory=set, compare=False)

    def get(self, key: str) -> object:
        """The value of a key, None where it is absent."""
        self.asked.add(key)
        return self.values.get(key)

    def ignore(self, keys: str) -> None:
        """Keys, parted by blanks, that say nothing about what the model computes."""
        self.asked.update(keys.split())

    def unread(self) -> tuple[str, ...]:
        """The keys with a value that nobody asked for so far."""
        given = {key for key, value in self.values.items() if value is not None}
        return tuple(sorted(given - self.asked))

    def error(self, key: str, expected: str) -> ConfigError:
        """The named error for `key`, absent or of a wrong value."""
        if key not in self.values:
            what, verb = f"the key {key!r} is missing; expected {expected}", "add"
        else:
            what, verb = f"{key!r} is {self.values[key]!r}; expected {expected}", "correct"
        return ConfigError(what, where=self.file, remedy=f"{verb} {key!r} in {self.file}")

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.get(key) is not None

    def null(self, key: str) -> bool:
        """Whether the key is there, and null."""
        return key in self.values and not self.given(key)

    def integer(self, key: str, least: int, most: int) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(key, f"an integer from {least} to {most}")
        return value

    def size(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A positive integer; `default`, where there is one, stands for an absent key or null."""
        if default is not None and not self.given(key):
            return default
        return self.integer(key, 1, most)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        if default is not None and not self.given(key):
            return default
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null stands for the default."""
        if not self.given(key):
            return default
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def required_flag(self, key: str) -> bool:
        """true or false; null stands for false, but the key must be there."""
        if key not in self.values:
            raise self.error(key, "true or false")
        return self.flag(key, False)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def only(self, key: str, *computed: object, why: str = COMPUTED) -> None:
        """Refuse a value other than `computed`; `why` says what makes them so."""
        if self.given(key) and not any(_same(self.get(key), value) for value in computed):
            listed = " or ".join(repr(value) for value in computed) or "null"
            raise self.error(key, f"{listed}: {why}")

    def divides(self, key: str, by: str) -> int:
        """`key` / `by`, which must be whole."""
        whole, parts = self.size(key), self.size(by)
        if whole % parts:
            raise self.error(key, f"a multiple of {by!r}, which is {parts}")
        return whole // parts


def block_length(config: Config, default: int) -> int:
    """The block of a block-causal attention mask: the config's, the user's, else the family's."""
    stated = {key: config.size(key) for key in ("block_length", "block_size") if config.given(key)}
    if len(set(stated.values())) > 1:
        what = f"the same as 'block_length', which is {stated['block_length']}"
        raise config.error("block_size", what)
    if stated:
        return next(iter(stated.values()))
    if config.block_length not in (None, default):
        text = (
            "%s: no 'block_length'; the attention's blocks have the %d positions asked for, not %d"
        )
        log.warning(text, config.file, config.block_length, default)
    return config.block_length or default


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)
