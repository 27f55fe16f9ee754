"""lm-evaluation-harness scores an artifact: `python -m dcompile.integrations.lm_eval --model dcompile ...`

The harness knows the models that are registered when it starts, so it is started from here; it takes
its own options. `--model_args artifact=model.dcx` and, with commas, `max_gen_toks`, `mc_samples`,
`threads` and the parameters of the compiled policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dcompile.decoding.scoring import Scorer
from dcompile.errors import RequestError
from dcompile.runtime.decode.loop import Runner

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names of one number; the first that is given counts, as there."""


class Request(Protocol):
    """What the harness asks: its `Instance`."""

    @property
    def args(self) -> tuple[Any, ...]: ...


@register_model("dcompile")  # type: ignore[untyped-decorator,unused-ignore]
class DcompileLM(LM):  # type: ignore[misc,unused-ignore]
    """An artifact as a model of the harness.

    Generation stops at the compiled policy's ends and is cut at the task's. Likelihoods are Monte
    Carlo bounds of `mc_samples` masks (`Scorer`), and need `--policy likelihood` when compiling.
    """

    def __init__(
        self,
        artifact: str,
        *,
        max_gen_toks: int = 256,
        mc_samples: int = 128,
        threads: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **parameters: float,
    ) -> None:
        super().__init__()
        self.runner = Runner.load(artifact, threads=threads)
        self.max_gen_toks, self.mc_samples = max_gen_toks, mc_samples
        self.parameters: dict[str, Any] = dict(parameters)
        # A template writes its special tokens itself.
        self._special = True

    @property
    def tokenizer_name(self) -> str:
        return str(self.runner.artifact.manifest["checkpoint"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        name = chat_template if isinstance(chat_template, str) else None
        return self.runner.tokenizer.template(name) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        self._special = False
        return self.runner.tokenizer.render(chat_history, add_generation_prompt)

    def generate_until(self, requests: Sequence[Request], **_: object) -> list[str]:
        groups: defaultdict[tuple[int, float], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._wanted(request.args[1])].append(index)
        texts: dict[int, str] = {}
        for (length, temperature), members in groups.items():
            room = self.runner.limits.max_length - self.runner.limits.total(0, length)
            prompts = [self._last(self._encode(requests[i].args[0]), room) for i in members]
            results = self.runner.generate(
                prompts, gen_length=length, temperature=temperature, **self.parameters
            )
            for index, result in zip(members, results, strict=True):
                texts[index] = _cut(result.text or "", requests[index].args[1].get("until"))
        return [texts[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Request], **_: object) -> list[tuple[float, bool]]:
        scorer = Scorer(self.runner)
        found = []
        for request in requests:
            context, continuation = self._pair(*request.args)
            likely = scorer.log_likelihood(context, continuation, self.mc_samples)
            found.append((likely, scorer.is_greedy(context, continuation)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Request], **_: object) -> list[float]:
        """Of whole texts, in pieces of the compiled length that do not see each other."""
        scorer, found = Scorer(self.runner), []
        whole = self.runner.limits.max_length
        whole -= whole % (self.runner.limits.span or 1)
        for request in requests:
            ids = self._encode(request.args[0])
            pieces = [ids[at : at + whole] for at in range(0, len(ids), whole)]
            found.append(sum(scorer.log_likelihood([], p, self.mc_samples) for p in pieces))
        return found

    def _wanted(self, asked: Mapping[str, Any]) -> tuple[int, float]:
        """Positions to generate, whole blocks and no more than half of the room; temperature."""
        limits = self.runner.limits
        block = limits.block_length
        wanted = int(_told(asked, *_LENGTHS, default=self.max_gen_toks))
        room = max(limits.max_length // 2 // block * block, block)
        length = min(wanted + -wanted % block, room)
        sampled = bool(asked.get("do_sample"))
        return length, float(_told(asked, "temperature", default=1.0)) if sampled else 0.0

    def _encode(self, text: str) -> list[int]:
        return self.runner.tokenizer.encode(text, special=self._special)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both as one text has them; a context that is too long loses its beginning."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        whole, before = self._encode(kept + continuation), self._encode(kept) if kept else []
        after = whole[len(before) :]
        limits = self.runner.limits
        room = limits.max_length - limits.total(0, len(after))
        if room < 0:
            what = f"a continuation of {len(after)} tokens does not fit into the artifact"
            raise RequestError(what, remedy=f"compile with --max-length {len(after)} or more")
        return self._last(before, room), after

    @staticmethod
    def _last(ids: list[int], count: int) -> list[int]:
        return ids[max(0, len(ids) - count) :]


def _told(asked: Mapping[str, Any], *names: str, default: float) -> Any:
    """The first of the named values that is there; null stands for the default."""
    return next((asked[name] for name in names if asked.get(name) is not None), default)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it."""
    ends = [until] if isinstance(until, str) else until or []
    return min((text.partition(end)[0] for end in ends if end), key=len, default=text)


def main() -> None:
    """The harness's own command line, with the model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
