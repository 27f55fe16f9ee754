"""What `run` prints: texts, numbers of a result, blocks as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from dcompile.runtime.decode.loop import Runner
    from dcompile.runtime.decode.sequence import Result


class Stream:
    """Prints what each block added; of several prompts, each block on a line with its number."""

    def __init__(self, runner: Runner, file: IO[str], several: bool) -> None:
        self._runner, self._file, self._several = runner, file, several
        self._tokens: dict[int, list[int]] = {}
        self._printed: dict[int, str] = {}
        self._ended: set[int] = set()

    def __call__(self, index: int, tokens: list[int]) -> None:
        so_far = self._tokens.setdefault(index, [])
        for token in tokens:
            if token in self._runner.limits.eos_ids:
                self._ended.add(index)
            if index not in self._ended:
                so_far.append(token)
        # A block may end inside a character; its other half comes with the next one.
        self._show(index, self._text(index).rstrip("\ufffd"))

    def end(self) -> None:
        for index in self._tokens:
            whole = self._text(index)
            if whole != self._printed[index]:
                self._show(index, whole)
        if not self._several:
            print(file=self._file, flush=True)

    def _text(self, index: int) -> str:
        tokens = self._tokens[index]
        return shown(self._runner.decode(tokens), tokens)

    def _show(self, index: int, text: str) -> None:
        """Print what is new of the text."""
        added = text[len(self._printed.get(index, "")) :]
        self._printed[index] = text
        line = f"[{index}] {added}\n" if self._several else added
        print(line, end="", file=self._file, flush=True)


def print_numbered(index: int, result: Result) -> None:
    line = json.dumps({"index": index, **asdict(result)}, ensure_ascii=False)
    print(line, flush=True)


def shown(text: str | None, tokens: Sequence[int]) -> str:
    return text if text is not None else ",".join(map(str, tokens))


def summary(result: Result) -> str:
    """What was kept of what was decoded, in how many forwards; the last two give the next number."""
    forwards, kept = result.forwards, len(result.tokens)
    decoded = round(result.tokens_per_forward * forwards)
    tokens = f"{decoded} tokens" if kept == decoded else f"{kept} tokens kept of {decoded} decoded"
    return (
        f"{tokens} in {forwards} forward{'s' * (forwards != 1)}, "
        f"{result.tokens_per_forward:.2f} a forward; "
        f"{result.tokens_per_second:.1f} {'kept ' * (kept != decoded)}a second"
    )
