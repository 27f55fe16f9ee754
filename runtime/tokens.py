"""Text to token ids and back, with the files of the checkpoint's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dcompile.errors import ArtifactError, RequestError
from dcompile.untrusted import parse_json

_FOLDER = "tokenizer/"


class Files(Protocol):
    """An artifact, or what else holds a tokenizer's files."""

    @property
    def names(self) -> Sequence[str]: ...

    def bytes(self, name: str) -> memoryview: ...

    def text(self, name: str) -> str: ...


class Tokenizer:
    """The artifact's tokenizer; loads its libraries on first use."""

    def __init__(self, artifact: Files) -> None:
        self._artifact = artifact
        self._files = {
            name.removeprefix(_FOLDER) for name in artifact.names if name.startswith(_FOLDER)
        }
        self._loaded: Any = None

    @property
    def present(self) -> bool:
        return "tokenizer.json" in self._files

    def encode(self, text: str, chat: bool = False, special: bool = True) -> list[int]:
        """Token ids of a text; of the text as a user's turn of a conversation where `chat`.

        Without `special` the tokenizer adds no tokens of its own, such as a beginning.
        """
        text = self.render([{"role": "user", "content": text}]) if chat else text
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            remedy = "write it in UTF-8"
            raise RequestError(
                "the prompt is no text: bytes of it are no characters", remedy=remedy
            )
        # A template writes its special tokens itself.
        encoding = self._tokenizer().encode(text, add_special_tokens=special and not chat)
        return [int(token) for token in encoding.ids]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer().decode(list(tokens), skip_special_tokens=True))

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            if not self.present:
                what = "the artifact has no tokenizer, so it takes and gives token ids only"
                remedy = (
                    "give the prompt as token ids (--prompt-ids 1,2,3), or compile a checkpoint "
                    "with a tokenizer.json (the tokenizers or transformers library writes one)"
                )
                raise RequestError(what, remedy=remedy)
            from tokenizers import Tokenizer as HuggingFaceTokenizer

            text = self._artifact.text(_FOLDER + "tokenizer.json")
            try:
                self._loaded = HuggingFaceTokenizer.from_str(text)
            except BaseException as error:  # the library raises nothing narrower, and panics
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                what = f"the tokenizer cannot be read: {error}"
                raise ArtifactError(what, where="tokenizer/tokenizer.json") from error
            self._loaded.no_truncation()
            self._loaded.no_padding()
        return self._loaded

    def _config(self) -> dict[str, Any]:
        if "tokenizer_config.json" not in self._files:
            return {}
        try:
            config = parse_json(self._artifact.bytes(_FOLDER + "tokenizer_config.json"))
        except ValueError as error:
            where = "tokenizer/tokenizer_config.json"
            raise ArtifactError("the tokenizer's config cannot be read", where=where) from error
        return config if isinstance(config, dict) else {}

    def _template(self, config: dict[str, Any]) -> str:
        if "chat_template.jinja" in self._files:
            return self._artifact.text(_FOLDER + "chat_template.jinja")
        template = config.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template}
            template = named.get("default")
        if not isinstance(template, str):
            remedy = "leave out --chat, or put the conversation's marks into the prompt"
            raise RequestError("the model's tokenizer has no chat template", remedy=remedy)
        return template

    def template(self) -> str:
        """The chat template's source; raises RequestError where there is none."""
        return self._template(self._config())

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        try:
            return bool(self.template())
        except RequestError:
            return False

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation (role, content) as the text that the model reads."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        config = self._config()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # As the library that templates are written for has it: no HTML escapes in JSON.
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _refuse
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        template = self._template(config)
        try:
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **special
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, KeyError) as error:
            raise RequestError(f"the chat template failed: {error}") from error


def _refuse(message: str) -> None:
    raise RequestError(f"the chat template refuses: {message}")
