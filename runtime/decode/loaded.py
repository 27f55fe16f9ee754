"""A loaded artifact and its slots: what engines and `generate` serve requests with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Self

from dcompile.errors import ArtifactError
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.caches import CachePolicy, cache_policy
from dcompile.runtime.decode.inputs import check_inputs
from dcompile.runtime.decode.requests import Limits, token_ids
from dcompile.runtime.decode.slots import slots_of
from dcompile.runtime.decode.step import Watch
from dcompile.runtime.opening import open_backend
from dcompile.runtime.tokens import Tokenizer


class Loaded:
    """An artifact that is ready; `watch` sees each step, `cache` may be set anew."""

    def __init__(self, artifact: Artifact, executor: Backend) -> None:
        self.artifact, self.executor = artifact, executor
        where = str(artifact.path)
        self.limits = Limits.read(artifact.manifest, artifact.plan.sizes, where)
        self.cache: CachePolicy = cache_policy(artifact.manifest["options"], self.limits.span)
        self.tokenizer = Tokenizer(artifact)
        self.watch: Watch | None = None
        self.slots = slots_of(artifact, executor, self.limits)
        self.slots_taken = Lock()
        """Held by the engine that serves requests in them."""
        check_inputs(artifact.plan, set(self.limits.parameters), where)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        verify: bool = True,
        threads: int | None = None,
        weights_at: str | Path | None = None,
    ) -> Self:
        """Open an artifact; `verify=False` does not hash its files.

        `weights_at` is the folder of weights outside the artifact, where they are not beside it.
        """
        artifact = open_artifact(path, verify, weights_at)
        try:
            return cls(artifact, open_backend(artifact, threads))
        except MemoryError as error:
            what = "this machine has too little memory for what the plan asks"
            raise ArtifactError(what, where=str(path), remedy="compile it smaller") from error

    def encode(self, prompt: str | Sequence[int], chat: bool = False) -> list[int]:
        """The token ids of a prompt, which may be ids already: a list, or an array of any library."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, chat)
        return token_ids(prompt)

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Tokens as text; None where the artifact has no tokenizer."""
        return self.tokenizer.decode(tokens) if self.tokenizer.present else None
