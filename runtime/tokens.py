"""Text to token ids and back, with the files of the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from dcompile.errors import ArtifactError, RequestError
from dcompile.runtime.token_files import TokenFiles
from dcompile.untrusted import parse_json

_FOLDER = "tokenizer/"
_TEMPLATES = "additional_chat_templates/"
_KINDS = {"tokenizer_config.json": "config", "special_tokens_map.json": "roles"}


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
                loaded = HuggingFaceTokenizer.from_str(text)
            except BaseException as error:  # the library raises nothing narrower, and panics
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                what = f"the tokenizer cannot be read: {error}"
                raise ArtifactError(what, where="tokenizer/tokenizer.json") from error
            self._add(loaded)
            loaded.no_truncation()
            loaded.no_padding()
            self._loaded = loaded
        return self._loaded

    def _add(self, tokenizer: Any) -> None:
        """Tokens that only the files beside tokenizer.json name, and whether they are found in texts."""
        from tokenizers import AddedToken

        split = self._object("tokenizer_config.json").get("split_special_tokens")
        tokenizer.encode_special_tokens = split is True
        decoder = tokenizer.get_added_tokens_decoder()
        present = {number: token.content for number, token in decoder.items()}
        with self._naming_files():
            told = [asdict(token) for token in self._token_files().to_add(present)]
        given = [{flag: v for flag, v in token.items() if v is not None} for token in told]
        tokenizer.add_tokens([AddedToken(**token) for token in given])

    @contextmanager
    def _naming_files(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError) as error:
            what = f"the tokenizer's files do not say which tokens it has: {error}"
            raise ArtifactError(what, where="tokenizer") from error

    def _token_files(self) -> TokenFiles:
        names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        return TokenFiles(*map(self._object, names))

    def _object(self, name: str) -> dict[str, Any]:
        """A file's JSON object, empty where there is no such file."""
        if name not in self._files:
            return {}
        try:
            value = parse_json(self._artifact.bytes(_FOLDER + name))
        except ValueError as error:
            what = f"the tokenizer's {_KINDS.get(name, 'tokens')} cannot be read"
            raise ArtifactError(what, where=_FOLDER + name) from error
        return value if isinstance(value, dict) else {}

    def template(self, name: str | None = None, tools: bool = False) -> str:
        """A chat template's source; raises RequestError where there is none.

        Of several it is the one of that name; by default the one for conversations with `tools`,
        where there is one and they have some, or else `default`.
        """
        found = self._templates()
        if name is None and tools and "tool_use" in found:
            name = "tool_use"
        template = found.get(name or "default")
        if isinstance(template, str):
            return template
        if found:
            remedy = f"name one of them: {', '.join(sorted(found))}"
            raise RequestError(
                f"the model's tokenizer has no chat template {name or 'default'!r}", remedy=remedy
            )
        remedy = "leave out --chat, or put the conversation's marks into the prompt"
        raise RequestError("the model's tokenizer has no chat template", remedy=remedy)

    def _templates(self) -> dict[str, Any]:
        """Chat templates by name; a single one is `default`."""
        files = {
            name.removeprefix(_TEMPLATES).removesuffix(".jinja"): name
            for name in self._files
            if name.startswith(_TEMPLATES)
        }
        if "chat_template.jinja" in self._files:
            files["default"] = "chat_template.jinja"
        if files:
            return {name: self._artifact.text(_FOLDER + file) for name, file in files.items()}
        told = self._object("tokenizer_config.json").get("chat_template")
        if isinstance(told, list):
            return {
                str(one.get("name")): one.get("template") for one in told if isinstance(one, dict)
            }
        if isinstance(told, dict):
            return told
        return {} if told is None else {"default": told}

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        try:
            return bool(self.template())
        except RequestError:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
    ) -> str:
        """A conversation (role, content) as the text that the model reads.

        `template` names one of several templates; `tools` are JSON schemas.
        """
        from dcompile.runtime.templates import render

        source = self.template(template, tools is not None)
        with self._naming_files():
            roles = {role: token.content for role, token in self._token_files().roles().items()}
        values = {"add_generation_prompt": add_generation_prompt, **roles}
        return render(source, messages, tools, documents, **values)
