"""Train the demo: a small LLaDA-MoE on procedural tasks, from nothing, on one CPU core.

    python bench/train/demo.py --out DIR [--minutes 35] [--seed 0] [--tasks spell_backward,...]

`reasoning-gym` makes the questions and scores the answers; this file only shortens the wording of
a question to one line that ends in " =".  DIR gets `model/` (Hugging Face layout), `heldout.jsonl`
and `results.json`.  The objective is LLaDA's masked diffusion on the answer tokens.

The learning rate follows the clock, so a run takes `--minutes` on any machine and two runs differ
by the number of their steps; `--steps` makes the schedule follow the steps instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from dcompile.frontends import llada_moe
from dcompile.frontends.base import Config, Definition
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.ir.weights import Concat, Recipe, Source, Stack

log = logging.getLogger("train")

GENERATION_LENGTH = 32
WATCHED = 24  # questions of each task
PAD, EOS, MASK, UNKNOWN = range(4)
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|mask|>", "<|unknown|>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{%- set text = messages[-1]['content'] | trim -%}"
    "{{ text if text.endswith('=') else text + ' =' }}"
)
CONFIG: dict[str, object] = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": 128,
    "dense_intermediate_size": 256,
    "shared_expert_intermediate_size": 0,
    "moe_layer_freq": [1, 1, 1, 1],
    "norm_topk_prob": False,
    "qk_layernorm": True,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "mask_token_id": MASK,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Run:
    out: Path
    minutes: float
    steps: int  # 0: the schedule follows the clock
    seed: int
    tasks: tuple[str, ...]
    batch: int  # sequences in a batch; a step has a few batches of each task
    pool: int  # entries of each task to draw from
    held_out: int
    save_at: tuple[float, ...]  # minutes at which the model so far is saved
    begin_from: Path | None  # a model of this shape to go on from


# --- tasks: reasoning-gym's entries in one line -------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One question, as the model reads it, and where it came from."""

    task: str
    prompt: str
    answer: str
    source: Mapping[str, object]  # what makes reasoning-gym's entry again: dataset, options, index


@dataclass(frozen=True)
class Task:
    """A dataset of reasoning-gym and its compact wording."""

    variants: tuple[Mapping[str, Any], ...]  # options of the dataset, each in equal share
    compact: Callable[[Mapping[str, Any]], tuple[str, str] | None]  # entry -> prompt, answer
    restore: Callable[[str], str] = lambda answer: answer  # what score_answer reads
    share: float = 1.0  # batches in a step, on average: what is hard gets more
    dataset: str = ""  # of reasoning-gym, where it is not the task's name


def spell_backward(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    word = entry["metadata"]["word"]
    return (f"spell backward: {word} =", entry["answer"]) if word.islower() else None


def chain_sum(entry: Mapping[str, Any]) -> tuple[str, str]:
    return f"sum: {entry['metadata']['expression']} =", entry["answer"]


def number_sorting(entry: Mapping[str, Any]) -> tuple[str, str]:
    facts = entry["metadata"]
    numbers, ordered = (
        " ".join(number.removesuffix(".0") for number in facts[key])
        for key in ("original_numbers", "sorted_numbers")
    )
    return f"sort {facts['direction']}: {numbers} =", ordered


def number_list(answer: str) -> str:
    return str([f"{number}.0" for number in answer.split()])


def word_sequence_reversal(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    words = ", ".join(entry["metadata"]["words"])
    short = len(words) <= 26 and all(word.isascii() for word in words)
    return (f"reverse: {words} =", entry["answer"]) if short else None


def long_reversal(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    words = ", ".join(entry["metadata"]["words"])
    fits = len(words) < GENERATION_LENGTH and all(word.isascii() for word in words)
    return (f"reverse: {words} =", entry["answer"]) if fits else None


def letter_counting(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    facts = entry["metadata"]
    span = " ".join(facts["span"])
    short = len(span) <= 26 and span.isascii()
    return (f"count {facts['target_letter']}: {span} =", entry["answer"]) if short else None


def word_sorting(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    facts = entry["metadata"]
    words = " ".join(facts["original_words"])
    short = len(words) <= 26 and words.isascii() and words.islower()
    wording = f"order {facts['direction']}: {words} ="
    return (wording, " ".join(facts["sorted_words"])) if short else None


def comma_list(answer: str) -> str:
    return ", ".join(answer.split())


TASKS: Mapping[str, Task] = {
    "spell_backward": Task(({"min_word_len": 3, "max_word_len": 8},), spell_backward, share=0.3),
    "chain_sum": Task(
        (
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        ),
        chain_sum,
        share=3.0,
    ),
    "number_sorting": Task(
        (
            {
                "min_numbers": 3,
                "max_numbers": 8,
                "min_decimals": 0,
                "max_decimals": 0,
                "min_value": 0,
                "max_value": 9,
            },
        ),
        number_sorting,
        number_list,
    ),
    "word_sequence_reversal": Task(({"min_words": 2, "max_words": 4},), word_sequence_reversal),
    "two_digit_sorting": Task(
        (
            {
                "min_numbers": 3,
                "max_numbers": 8,
                "min_decimals": 0,
                "max_decimals": 0,
                "min_value": 10,
                "max_value": 99,
            },
        ),
        number_sorting,
        number_list,
        dataset="number_sorting",
    ),
    "word_sorting": Task(({"min_words": 3, "max_words": 5},), word_sorting, comma_list),
    "letter_counting": Task(({"min_words": 1, "max_words": 4},), letter_counting),
    "long_spelling": Task(
        ({"min_word_len": 7, "max_word_len": 14},), spell_backward, dataset="spell_backward"
    ),
    "long_reversal": Task(
        ({"min_words": 4, "max_words": 6},), long_reversal, dataset="word_sequence_reversal"
    ),
    "long_sum": Task(
        (
            {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 3},
            {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        ),
        chain_sum,
        share=2.0,
        dataset="chain_sum",
    ),
}
HARD_TASKS = ("long_spelling", "long_sum", "two_digit_sorting", "word_sorting", "long_reversal")
DEFAULT_TASKS = ("spell_backward", "chain_sum", "number_sorting", "word_sequence_reversal")
MIXES = {"default": DEFAULT_TASKS, "hard": HARD_TASKS}


def entries(name: str, seed: int, size: int) -> Iterator[Item]:
    """Up to `size` different questions; an entry's generator is seeded with seed + its index."""
    task, seen = TASKS[name], set[str]()
    dataset = task.dataset or name
    for options in task.variants:
        made = reasoning_gym.create_dataset(dataset, seed=seed, size=size, **options)
        for index in range(size // len(task.variants)):
            wording = task.compact(made[index])
            if wording is None or wording[0] in seen:
                continue
            seen.add(wording[0])
            source = {"dataset": dataset, "options": {**options, "seed": seed}, "index": index}
            yield Item(name, *wording, source)


def reasoning_gym_score(item: Item, answer: str) -> float:
    options = dict(item.source["options"])  # type: ignore[call-overload]
    made = reasoning_gym.create_dataset(str(item.source["dataset"]), size=1 << 30, **options)
    entry = made[item.source["index"]]
    return float(made.score_answer(TASKS[item.task].restore(answer), entry))


@dataclass(frozen=True)
class Split:
    train: list[Item]
    watched: list[Item]  # looked at while training
    held_out: list[Item]  # looked at once, at the end


def split(run: Run) -> Split:
    """Items of every task; no prompt is in two parts."""
    parts = Split([], [], [])
    for name in run.tasks:
        # The two ranges of seeds do not meet: an entry is seeded with seed + index.
        candidates = list(entries(name, 10**9 + run.seed * 10**8, 64 * run.held_out))
        chosen = random.Random(run.seed).sample(candidates, run.held_out + WATCHED)
        prompts = {item.prompt for item in chosen}
        fresh = entries(name, run.seed * 10**7, run.pool)
        parts.train.extend(item for item in fresh if item.prompt not in prompts)
        parts.held_out.extend(chosen[: run.held_out])
        parts.watched.extend(chosen[run.held_out :])
    return parts


# --- tokens --------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """One token a printable ASCII character."""
    names = [*SPECIAL, *CHARACTERS]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def until_eos(ids: Sequence[int]) -> list[int]:
    return list(ids[: ids.index(EOS)]) if EOS in ids else list(ids)


@dataclass(frozen=True)
class Buckets:
    """Training items by task and prompt length, so that a batch needs no padding."""

    tasks: tuple[str, ...]
    lengths: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]]  # prompts [n, P], answers [n, 32]

    @staticmethod
    def of(items: Sequence[Item], tokenizer: Tokenizer) -> Buckets:
        rows: dict[str, dict[int, list[tuple[list[int], list[int]]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for item in items:
            prompt, answer = (tokenizer.encode(text).ids for text in (item.prompt, item.answer))
            answer += [EOS] * (GENERATION_LENGTH - len(answer))
            rows[item.task][len(prompt)].append((prompt, answer))
        lengths = {
            task: {
                length: tuple(torch.tensor(part) for part in zip(*pairs, strict=True))
                for length, pairs in by_length.items()
            }
            for task, by_length in rows.items()
        }
        return Buckets(tuple(rows), lengths)  # type: ignore[arg-type]

    def draw(self, task: str, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        by_length = self.lengths[task]
        counts = [len(prompts) for prompts, _ in by_length.values()]
        prompts, answers = rng.choices(list(by_length.values()), counts)[0]
        pick = torch.tensor([rng.randrange(len(prompts)) for _ in range(size)])
        return prompts[pick], answers[pick]


# --- the objective -------------------------------------------------------------------------------


def shorten(answers: Tensor, chance: float, rng: random.Random) -> Tensor:
    """Sometimes the shortest multiple of 8 that holds every answer and an end: cheaper to train."""
    if rng.random() >= chance:
        return answers
    longest = int((answers != EOS).sum(1).max())
    return answers[:, : min(GENERATION_LENGTH, (longest // 8 + 1) * 8)]


def mask_anywhere(answers: Tensor) -> tuple[Tensor, Tensor]:
    """LLaDA's: each token with a ratio t of its sequence; masked [B, G], weight 1/t."""
    size, length = answers.shape
    # Ratios spread evenly over the batch have less variance than independent ones.
    ratio = (torch.rand(1) + torch.arange(size) / size) % 1
    # A fifth of them are 1: every token masked, which is where decoding begins.
    ratio = (1.25 * ratio).clamp(1.0 / length, 1.0)[:, None]
    masked = torch.rand(size, length) < ratio
    return masked, masked / ratio


def mask_blockwise(answers: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    """As decoding sees it: clean before a block, masked with ratio t inside, all masked after."""
    length = answers.shape[1]
    block = rng.choice([n for n in (8, 16, 32) if n <= length])
    longest = int((answers != EOS).sum(1).max())
    start = rng.randrange(0, longest + 1, block)
    masked, weight = mask_anywhere(answers)
    position = torch.arange(length)
    after, inside = position >= start + block, (position >= start) & (position < start + block)
    masked = (masked & inside) | after
    return masked, torch.where(inside, weight * inside, masked * 0.5)


def masked_loss(model: nn.Module, prompts: Tensor, answers: Tensor, rng: random.Random) -> Tensor:
    """Cross entropy of the masked answer tokens, weighted by 1/t, over the answer's length.

    An answer of 3 tokens has 28 ends behind its first; they weigh 0.1 each, and in the length too.
    """
    blockwise = rng.random() < 0.3
    masked, weight = mask_blockwise(answers, rng) if blockwise else mask_anywhere(answers)
    ended = (answers == EOS).cumsum(1) > 1
    importance = torch.where(ended, 0.1, 1.0)
    ids = torch.cat((prompts, answers.masked_fill(masked, MASK)), 1)
    logits = model(ids)[:, prompts.shape[1] :]
    each = F.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
    loss: Tensor = ((each * weight * importance).sum(1) / importance.sum(1)).mean()
    return loss


# --- the model while it is trained ---------------------------------------------------------------


def sparse_moe(moe: nn.Module, balance: list[Tensor], x: Tensor) -> Tensor:
    """The frontend's MoE, the chosen experts only: the same sums in another order.

    Appends the load-balancing loss, experts * sum_e (share of tokens)_e * (mean score)_e.
    """
    gate, experts = moe.gate, moe.experts
    top_k, count = gate.sizes.top_k, gate.sizes.experts  # type: ignore[union-attr]
    flat = x.flatten(0, 1)
    scores = F.linear(flat, gate.weight).softmax(-1)  # type: ignore[arg-type]
    weights, chosen = scores.topk(top_k, dim=-1)
    order = chosen.flatten().argsort(stable=True)
    loads = chosen.flatten().bincount(minlength=count)
    balance.append(count * (loads / loads.sum() * scores.mean(0)).sum())
    token = order // top_k
    rows = flat[token].split(loads.tolist())
    out = torch.cat(
        [
            (F.silu(r @ gate_proj.T) * (r @ up_proj.T)) @ down_proj.T
            for r, gate_proj, up_proj, down_proj in zip(
                rows,
                experts.gate_proj,  # type: ignore[arg-type,union-attr]
                experts.up_proj,  # type: ignore[arg-type,union-attr]
                experts.down_proj,  # type: ignore[arg-type,union-attr]
                strict=True,
            )
        ]
    )
    out = out * weights.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, token, out).view_as(x)


def initialise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.ones_(parameter)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        else:
            wide = "embed" in name
            nn.init.normal_(parameter, std=0.3 if wide else parameter.shape[-1] ** -0.5)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is the nearest orthogonal matrix (Newton-Schulz), for hidden matrices.

    Stacked experts are one batch of matrices."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape[-2:]].append(parameter)
            for shape, parameters in by_shape.items():
                moved = [self.direction(p, group["momentum"]).view(-1, *shape) for p in parameters]
                step = orthogonalise(torch.cat(moved)) * max(1.0, shape[0] / shape[1]) ** 0.5
                parts = step.split([len(part) for part in moved])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.add_(part.view_as(parameter), alpha=-group["lr"])

    def direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        average = state.setdefault("average", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps on a batch of matrices [n, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    done = []
    for x in matrices.split(8):  # as many as stay in a core's cache
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        done.append(x)
    return torch.cat(done)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.dim() > 1 and not any(
            k in name for k in ("embed", "head", "gate.weight")
        )
        (matrices if hidden else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=0.02), adam]


def train(run: Run, model: nn.Module, buckets: Buckets, watch: Callable[[float], None]) -> int:
    """Train until the schedule ends, calling `watch(minutes)` now and then; returns the steps."""
    rng, balance = random.Random(run.seed), list[Tensor]()
    for layer in model.layers:  # type: ignore[union-attr]
        layer.mlp.forward = partial(sparse_moe, layer.mlp, balance)
    parts = optimizers(model)
    peaks = [[group["lr"] for group in part.param_groups] for part in parts]
    began, step, shown, tokens = time.monotonic(), 0, 0.0, 0
    losses = dict.fromkeys(buckets.tasks, 1.0)
    while True:
        minutes = (time.monotonic() - began) / 60
        progress = step / run.steps if run.steps else minutes / run.minutes
        if progress >= 1:
            break
        # Warm up, hold, then fall linearly to nothing over the last 60 %.
        rate = min(1.0, (step + 1) / 100, (1 - progress) / 0.6)
        for part, lrs in zip(parts, peaks, strict=True):
            for group, peak in zip(part.param_groups, lrs, strict=True):
                group["lr"] = peak * rate
        for task in buckets.tasks:
            for _ in range(int(TASKS[task].share + rng.random())):
                prompts, answers = buckets.draw(task, run.batch, rng)
                answers = shorten(answers, 0.8 if progress < 0.6 else 0.4, rng)
                loss = masked_loss(model, prompts, answers, rng)
                (loss + 0.01 * sum(balance) / len(balance)).backward()
                balance.clear()
                tokens += prompts.numel() + answers.numel()
                losses[task] += 0.01 * (loss.item() - losses[task])
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        for part in parts:
            part.step()
            part.zero_grad()
        step += 1
        if minutes - shown >= 1:
            shown = minutes
            speed = tokens / (time.monotonic() - began)
            parted = " ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
            log.info("%.1f min step %d %.0f tok/s %s", minutes, step, speed, parted)
            watch(minutes)
    for layer in model.layers:  # type: ignore[union-attr]
        del layer.mlp.forward
    return step


# --- the plain reference decode ------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    tokens: list[int]  # up to the first EOS
    forwards: int
    committed: int  # tokens decided by them, EOS included; not those that the early stop filled in


@torch.no_grad()
def decode(model: nn.Module, prompts: Tensor, block: int, threshold: float) -> list[Decoded]:
    """LLaDA, blockwise, uncached: commit what has confidence >= threshold, and always the best."""
    size, start = prompts.shape
    ids = torch.cat((prompts, torch.full((size, GENERATION_LENGTH), MASK)), 1)
    forwards, committed = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    finished = torch.zeros(size, dtype=torch.bool)
    for at in range(start, start + GENERATION_LENGTH, block):
        window = slice(at, at + block)
        while True:
            live = ((ids[:, window] == MASK).any(1) & ~finished).nonzero()[:, 0]
            if not len(live):
                break
            logits = model(ids[live])[:, window]
            open_ = ids[live, window] == MASK
            chosen = logits.clone()
            chosen[..., MASK] = -torch.inf
            token = chosen.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            confidence = confidence.masked_fill(~open_, -torch.inf)
            commit = confidence >= threshold
            commit.scatter_(1, confidence.argmax(1, keepdim=True), True)
            ids[live, window] = torch.where(commit, token, ids[live, window])
            forwards[live] += 1
            committed[live] += commit.sum(1)
        finished |= (ids[:, window] == EOS).any(1)
    return [
        Decoded(until_eos(row[start:].tolist()), int(n), int(c))
        for row, n, c in zip(ids, forwards, committed, strict=True)
    ]


def decode_items(
    model: nn.Module, items: Sequence[Item], tokenizer: Tokenizer, block: int, threshold: float
) -> list[Decoded]:
    """`decode` of each item, those of equal prompt length together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    prompts = [tokenizer.encode(item.prompt).ids for item in items]
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    decoded: dict[int, Decoded] = {}
    for group in by_length.values():
        batch = torch.tensor([prompts[i] for i in group])
        decoded |= zip(group, decode(model, batch, block, threshold), strict=True)
    return [decoded[i] for i in range(len(items))]


def evaluate(
    model: nn.Module, items: Sequence[Item], tokenizer: Tokenizer, block: int, threshold: float
) -> dict[str, object]:
    """Exact match and reasoning-gym's score by task; forwards and tokens a forward over all."""
    decoded = decode_items(model, items, tokenizer, block, threshold)
    exact, scores = defaultdict(list), defaultdict(list)
    for item, one in zip(items, decoded, strict=True):
        answer = tokenizer.decode(one.tokens)
        exact[item.task].append(float(answer == item.answer))
        scores[item.task].append(float(reasoning_gym_score(item, answer) >= 1))
    forwards = sum(one.forwards for one in decoded)
    return {
        "block_length": block,
        "threshold": threshold,
        "exact_match": {task: mean(hits) for task, hits in exact.items()},
        "reasoning_gym_correct": {task: mean(hits) for task, hits in scores.items()},
        "exact_match_all": mean([hit for hits in exact.values() for hit in hits]),
        "forwards_per_prompt": round(forwards / len(decoded), 3),
        "tokens_per_forward": round(sum(one.committed for one in decoded) / forwards, 3),
        "answer_tokens_per_forward": round(sum(len(one.tokens) for one in decoded) / forwards, 3),
    }


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


# --- files ---------------------------------------------------------------------------------------


def checkpoint_tensors(definition: Definition, model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters under the names of the checkpoint: its recipes, backwards."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, recipe in definition.recipes(list(parameters)).items():
        tensors |= taken_apart(recipe, parameters[name].detach())
    return tensors


def taken_apart(recipe: Recipe, tensor: Tensor) -> dict[str, Tensor]:
    if isinstance(recipe, Source):
        return {recipe.name: tensor.contiguous()}
    if isinstance(recipe, Concat):
        raise TypeError("llada_moe has no joined tensors")
    assert isinstance(recipe, Stack)
    tensors: dict[str, Tensor] = {}
    for part, one in zip(recipe.parts, tensor.unbind(0), strict=True):
        tensors |= taken_apart(part, one.clone())
    return tensors


def save_model(folder: Path, definition: Definition, model: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(definition, model), folder / "model.safetensors", {"format": "pt"})
    make_tokenizer().save(str(folder / "tokenizer.json"))
    texts: dict[str, object] = {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": EOS, "pad_token_id": PAD},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL[PAD],
            "eos_token": SPECIAL[EOS],
            "mask_token": SPECIAL[MASK],
            "unk_token": SPECIAL[UNKNOWN],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    }
    for name, values in texts.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def save_items(path: Path, items: Sequence[Item]) -> None:
    path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))


def main(run: Run) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    tokenizer = make_tokenizer()
    definition = llada_moe.read(Config(CONFIG, "config.json"))
    layers = range(len(definition.layer_kinds))
    model = definition.build(layers, torch.float32)
    if run.begin_from is None:
        initialise(model)
    else:
        model.load_state_dict(open_checkpoint(run.begin_from).reference().state_dict())
    items = split(run)
    run.out.mkdir(parents=True, exist_ok=True)
    save_items(run.out / "heldout.jsonl", items.held_out)
    buckets = Buckets.of(items.train, tokenizer)
    log.info(
        "%d items, %d parameters", len(items.train), sum(p.numel() for p in model.parameters())
    )
    due = list(range(4, 600, 4)), list(run.save_at)

    def watch(minutes: float) -> None:
        looks, saves = due
        if minutes >= looks[0]:
            looks.pop(0)
            log.info("watched: %s", evaluate(model, items.watched, tokenizer, 32, 0.9))
        if saves and minutes >= saves[0]:
            save_model(run.out / f"model_{saves.pop(0):g}min", definition, model)

    began = time.monotonic()
    steps = train(run, model, buckets, watch)
    took = (time.monotonic() - began) / 60
    save_model(run.out / "model", definition, model)
    table = [
        evaluate(model, items.held_out, tokenizer, block, threshold)
        for block in (8, 16, 32)
        for threshold in (0.8, 0.9)
    ]
    for row in table:
        log.info("held out: %s", row)
    facts = {
        "seed": run.seed,
        "begin_from": run.begin_from and run.begin_from.as_posix(),
        "tasks": run.tasks,
        "steps": steps,
        "batch": run.batch,
        "training_items": len(items.train),
        "minutes": round(took, 1),
        "table": table,
    }
    (run.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


def arguments() -> Run:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default="default", help=", ".join([*MIXES, *TASKS]))
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--pool", type=int, default=60_000)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--begin-from", type=Path, metavar="MODEL")
    parser.add_argument("--save-at", default="", help="minutes, for example 15,25")
    given = vars(parser.parse_args())
    given["tasks"] = MIXES.get(given["tasks"], tuple(given["tasks"].split(",")))
    given["save_at"] = tuple(float(m) for m in given["save_at"].split(",") if m)
    return Run(**given)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(arguments())
