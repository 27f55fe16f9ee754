"""What a tokenizer's files say together: which token has which role, and which tokens are added.

The rules are those of `AutoTokenizer` for a tokenizer.json and the files beside it.  Where
tokenizer_config.json lists the added tokens, special_tokens_map.json and added_tokens.json, the
files of older versions, are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

_ROLES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True)
class Token:
    """A token that is found in a text before anything else is."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    """Whether it is found in the normal form of a text; None where it is not special."""


@dataclass(frozen=True)
class TokenFiles:
    """The three files beside tokenizer.json, empty where they are missing.

    Its methods raise ValueError where a file has something else in a token's place.
    """

    config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[str, Any]

    def roles(self) -> dict[str, Token]:
        """Tokens by role, as templates name them; those that every tokenizer may have come first."""
        older = self._older()
        plain = {role: self.config.get(role) for role in _ROLES} | {
            role: value for role, value in older.items() if role in _ROLES
        }
        own = _own_roles(older) | _own_roles(self.config)
        for files in (self.config, older):
            own |= _mapping(files.get(_EXTRA))
        return {r: _token(value) for r, value in (plain | own).items() if value is not None}

    def to_add(self, present: Mapping[int, str]) -> Iterator[Token]:
        """Tokens for the tokenizer to add, in order; `present` are the texts that it has added, by id.

        One that it has already takes the flags of the last that is added.
        """
        listed, roles = self._listed(present), self.roles()
        named = {token.content for token in roles.values()}
        known = {token.content for token in listed} | set(present.values())
        others = [t for t in (*roles.values(), *self._extra()) if t.content not in known]
        for token in (*listed, *dict.fromkeys(others)):
            yield replace(token, special=token.special or token.content in named)

    def _older(self) -> Mapping[str, Any]:
        return {} if "added_tokens_decoder" in self.config else self.special_tokens_map

    def _listed(self, present: Mapping[int, str]) -> list[Token]:
        """Those with an id, by their ids."""
        if "added_tokens_decoder" in self.config:
            decoder = _mapping(self.config["added_tokens_decoder"])
            return [_token(decoder[key]) for key in sorted(decoder, key=int)]
        special = {token.content for role, token in self.roles().items() if role in _ROLES}
        special |= {token.content for token in self._extra(additional=False)}
        numbers = {int(number): text for text, number in self.added_tokens.items()}
        return [
            Token(numbers[n], numbers[n] in special, normalized=numbers[n] not in special)
            for n in sorted(numbers.keys() - present.keys())
        ]

    def _extra(self, additional: bool = True) -> list[Token]:
        """Special tokens without a role."""
        files = [self.config, self._older()]
        lists = [told[_EXTRA] for told in files if isinstance(told.get(_EXTRA), list)]
        # The older name counts where a file has not the newer one.
        if _ADDITIONAL in self.config and not self.config.get(_EXTRA):
            lists.insert(0, self.config[_ADDITIONAL])
        if additional and not lists:
            lists = [files[1].get(_ADDITIONAL)]
        found = [one for told in lists for one in _list(told)]
        return [_token(one) for one in found]


def _own_roles(values: Mapping[str, Any]) -> dict[str, Any]:
    """Roles of this tokenizer alone; a switch such as `add_bos_token` is none."""
    return {
        key: value
        for key, value in values.items()
        if key.endswith("_token") and key not in _ROLES and isinstance(value, (str, Mapping))
    }


def _token(value: Any) -> Token:
    if isinstance(value, str):
        return Token(value, special=True)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {flag: bool(value[flag]) for flag in _FLAGS if value.get(flag) is not None}
        return Token(value["content"], bool(value.get("special", False)), **flags)
    raise ValueError(f"{value!r} is no token")


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else []
