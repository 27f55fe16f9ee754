"""A folder of a tokenizer's files, for the library's own classes and for the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from dcompile.runtime.tokens import Tokenizer

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The tokens that tokenizer.json has added itself; 256 bytes come before them."""


class Folder:
    """What an artifact is to the runtime's tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = (path for path in folder.rglob("*") if path.is_file())
        self.names = [f"tokenizer/{path.relative_to(folder).as_posix()}" for path in files]

    def bytes(self, name: str) -> memoryview:
        return memoryview((self._folder / name.removeprefix("tokenizer/")).read_bytes())

    def text(self, name: str) -> str:
        return str(self.bytes(name), "utf-8")


def write_tokenizer(folder: Path, config: dict[str, Any] | None, **files: Any) -> Tokenizer:
    """Bytes as tokens; `files` are JSON values, or texts, by name with `__` for the dot."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = HuggingFaceTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in ADDED])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        files["tokenizer_config__json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        path = folder / name.replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Tokenizer(Folder(folder))
