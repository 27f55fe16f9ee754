"""The mask id and the end-of-sequence ids, from the config or the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping

from dcompile.errors import ConfigError
from dcompile.frontends.base import Config
from dcompile.untrusted import parse_json

MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "<mask>", "<|MASK|>", "[MASK]")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates/*.jinja"


def find_mask_id(
    config: Config, files: Mapping[str, bytes], vocab_size: int, chosen: int | None
) -> int:
    """The id of the mask token: `chosen`, else the config's, else the tokenizer's."""
    if chosen is not None:
        return _in_vocabulary(config, "--mask-id", chosen, vocab_size)
    if config.given("mask_token_id"):
        return _in_vocabulary(config, "mask_token_id", config.get("mask_token_id"), vocab_size)
    added = added_tokens(files)
    for token in (_named(files, "mask_token"), *MASK_TOKENS):
        if token in added:
            return _in_vocabulary(config, f"the token {token!r}", added[token], vocab_size)
    raise ConfigError(
        "the mask token's id is in neither the config ('mask_token_id') nor the tokenizer's files",
        where=config.file,
        remedy="say it with --mask-id N, or add 'mask_token_id' to the config",
    )


def find_eos_ids(config: Config, files: Mapping[str, bytes], vocab_size: int) -> tuple[int, ...]:
    """All ids that end a sequence, the config's first; none only where the config says null."""
    generation = read_object(files, "generation_config.json")
    found = [
        _in_vocabulary(config, "eos_token_id", one, vocab_size)
        for values in (config.values, generation)
        for one in _listed(values.get("eos_token_id"))
    ]
    token = _named(files, "eos_token")
    added = added_tokens(files)
    if not found and token in added:
        found = [_in_vocabulary(config, f"the token {token!r}", added[token], vocab_size)]
    if not found and "eos_token_id" not in config.values:
        raise config.error("eos_token_id", "the id (or ids) that end a sequence, or null")
    return tuple(dict.fromkeys(found))


def added_tokens(files: Mapping[str, bytes]) -> dict[str, int]:
    """Special tokens by their text, from whichever tokenizer files there are."""
    found: dict[str, object] = dict(read_object(files, "added_tokens.json"))
    decoder = read_object(files, "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        found |= {
            str(token.get("content")): int(number)
            for number, token in decoder.items()
            if isinstance(token, dict) and number.isdecimal()
        }
    listed = read_object(files, "tokenizer.json").get("added_tokens")
    if isinstance(listed, list):
        found |= {str(t.get("content")): t.get("id") for t in listed if isinstance(t, dict)}
    return {token: number for token, number in found.items() if isinstance(number, int)}


def _in_vocabulary(config: Config, what: str, value: object, vocab_size: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size:
        return value
    raise ConfigError(
        f"{what} is {value!r}; expected an id of the vocabulary, 0 to {vocab_size - 1}",
        where=config.file,
        remedy="give an id of the vocabulary"
        if what == "--mask-id"
        else f"correct {what}" + (", or say --mask-id N" if "mask" in what.lower() else ""),
    )


def _named(files: Mapping[str, bytes], role: str) -> str:
    """The text of the token in a role such as `mask_token`, empty where it has none."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if text := _text(read_object(files, file).get(role)):
            return text
    return ""


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def role_tokens(files: Mapping[str, bytes]) -> set[str]:
    """The texts of all tokens in a role: begin and end of sequence, mask, padding and so on."""
    found: set[str] = set()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for role, token in read_object(files, file).items():
            if role.endswith("_token") or role == "additional_special_tokens":
                found |= {_text(one) for one in _listed(token)}
    return found - {""}


def _text(token: object) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def read_object(files: Mapping[str, bytes], name: str) -> dict[str, object]:
    """A file's JSON object; empty where there is no such file, or where it holds something else."""
    if name not in files:
        return {}
    try:
        value = parse_json(files[name])
    except ValueError as error:
        raise ConfigError(
            f"cannot be read as JSON: {error}", where=name, remedy="restore the file"
        ) from None
    return value if isinstance(value, dict) else {}
