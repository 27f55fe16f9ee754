"""tokenizer.json of a checkpoint that has only vocab.json and merges.txt, as Dream's has.

Byte-level BPE (Radford et al. 2019) with the words and the normal form of the tokenizer class that
tokenizer_config.json names; no code of the checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dcompile.errors import ConfigError
from dcompile.frontends.tokens import added_tokens, read_object, role_tokens

# Contractions, words with one sign before them, single digits, signs with line ends, white space.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = ("Qwen2Tokenizer", "Qwen3Tokenizer", "DreamTokenizer")
_GPT2 = ("GPT2Tokenizer",)


def with_tokenizer_json(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The tokenizer's files and, where it can be made of them, the tokenizer.json that they lack.

    Raises ConfigError where vocab.json, merges.txt and the added tokens contradict one another.
    """
    if "tokenizer.json" in files or not {"vocab.json", "merges.txt"} <= set(files):
        return files
    named = read_object(files, "tokenizer_config.json").get("tokenizer_class")
    kind = str(named).removesuffix("Fast")
    if kind not in (*_QWEN2, *_GPT2):
        return files
    tokenizer = Tokenizer(_model(files))
    if kind in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in sorted(_added(files)):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ConfigError(
                f"the added token {token.content!r} has id {number}, the next id without a token "
                f"is {tokenizer.token_to_id(token.content)}",
                where="tokenizer_config.json",
                remedy="restore vocab.json and the list of added tokens of one and the same model",
            )
    return {**files, "tokenizer.json": tokenizer.to_str().encode()}


def _model(files: Mapping[str, bytes]) -> models.BPE:
    read = read_object(files, "vocab.json")
    vocab = {token: n for token, n in read.items() if type(n) is int and 0 <= n < 1 << 31}
    if not vocab or len(vocab) < len(read):
        raise ConfigError(
            "no object of tokens with their ids", where="vocab.json", remedy="restore the file"
        )
    try:
        lines = files["merges.txt"].decode().split("\n")
        merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
        return models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False)
    except Exception as error:  # the library raises nothing narrower
        what = f"the merges do not fit the tokens of vocab.json: {error}"
        raise ConfigError(what, where="merges.txt", remedy="restore the files") from None


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.rstrip("\r").partition(" ")
    return left, right


def _added(files: Mapping[str, bytes]) -> Iterator[tuple[int, AddedToken]]:
    flags = ("lstrip", "rstrip", "single_word")
    decoder = read_object(files, "tokenizer_config.json").get("added_tokens_decoder")
    described: dict[str, dict[str, Any]] = {}
    if isinstance(decoder, dict):
        described = {str(t.get("content")): t for t in decoder.values() if isinstance(t, dict)}
    roles = role_tokens(files)
    for content, number in added_tokens(files).items():
        told = described.get(content, {})
        special = bool(told.get("special", content in roles))
        kept = {flag: bool(told.get(flag, False)) for flag in flags}
        normalized = bool(told.get("normalized", not special))
        yield number, AddedToken(content, special=special, normalized=normalized, **kept)
