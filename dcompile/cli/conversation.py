"""A conversation in a terminal: turns in the model's chat template, answers block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import typer

from dcompile.cli.printed import Stream, shown, summary
from dcompile.cli.requests import generate
from dcompile.errors import RequestError
from dcompile.runtime.decode.loop import OnBlock, Runner
from dcompile.runtime.decode.sequence import Result

Message = dict[str, str]


class Conversation:
    """What was said so far; raises RequestError where the artifact has no chat template."""

    def __init__(
        self,
        runner: Runner,
        system: str | None,
        gen_length: int | None,
        request: Mapping[str, Any],
    ) -> None:
        if not runner.tokenizer.has_template:
            raise RequestError(
                "the artifact has no chat template, so it knows no turns of a conversation",
                where=str(runner.artifact.path),
                remedy="dcompile run with --prompt",
            )
        self.runner = runner
        self._length, self._request = gen_length, request
        self._opening: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.turns: list[Message] = []

    def answer(self, text: str, on_block: OnBlock | None = None) -> Result:
        """The model's next turn after the user's; both are kept where it succeeds."""
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt = self.runner.tokenizer.render([*self._opening, *asked])
        # A template writes its special tokens itself.
        ids = self.runner.tokenizer.encode(prompt, special=False)
        request = {**self._request, "on_block": on_block}
        (result,) = generate(self.runner, [ids], False, self._length, {}, **request)
        self.turns = [*asked, {"role": "assistant", "content": result.text or ""}]
        return result

    def clear(self) -> None:
        self.turns = []


def talk(conversation: Conversation, quiet: bool) -> None:
    """Answer every line of standard input, as blocks are decided where that is seen by a person."""
    seen = sys.stdout.isatty()
    for line in _lines():
        if line.strip() == "/clear":
            conversation.clear()
        elif line.strip():
            _take_turn(conversation, line, seen, quiet)


def _take_turn(conversation: Conversation, line: str, seen: bool, quiet: bool) -> None:
    stream = Stream(conversation.runner, sys.stdout, several=False) if seen else None
    try:
        result = conversation.answer(line, stream)
    except RequestError as error:
        # A person may begin again where the conversation has become too long; a script must hear of it.
        if not (seen and conversation.turns):
            raise
        typer.echo(f"{type(error).__name__}: {error}\n  or     /clear begins again", err=True)
        return
    if stream is None:
        typer.echo(shown(result.text, result.tokens))
    else:
        stream.end()
    if seen and not quiet:
        typer.echo(summary(result), err=True)


def _lines() -> Iterator[str]:
    """Lines of standard input without their ends, asked for where a person types them."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history and editing)
    try:
        while True:
            yield input("> " if typed else "")
    except EOFError:
        if typed:
            typer.echo()
    except UnicodeDecodeError as error:
        raise RequestError(f"what was typed is not text: {error}") from error
