"""What `policies.py` measured, as text: intervals, fronts, choices and their confirmation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

MARGIN = 0.05
"""Of accuracy, that a setting must be shown not to lose to be chosen."""
DRAWS = 4000
"""Of a bootstrap; the generator's seed is fixed, so that equal rows make equal tables."""


@dataclass(frozen=True)
class Row:
    """What one setting with one cache came to, question by question."""

    model: str
    policy: str
    manager: str
    cache: str
    hits: str
    """A digit a question: 1 where the answer is the wanted one."""
    same: str
    """1 where it is the reference's."""
    forwards: tuple[int, ...]
    tokens: tuple[int, ...]
    """Before the end."""
    texts: tuple[str, ...] = ()
    """The answers; of the reference only."""
    rows: int = 0
    """Positions computed, over all questions."""
    seconds: float = 0.0

    @staticmethod
    def read(path: Path) -> list[Row]:
        found = []
        for item in json.loads(path.read_text()):
            for name in ("forwards", "tokens"):
                item[name] = tuple(map(int, item[name].split()))
            found.append(Row(**{**item, "texts": tuple(item["texts"])}))
        return found

    @staticmethod
    def written(rows: Sequence[Row]) -> str:
        """JSON, one line a row."""
        lines = []
        for row in rows:
            numbers = {
                name: " ".join(map(str, getattr(row, name))) for name in ("forwards", "tokens")
            }
            lines.append(json.dumps(asdict(row) | numbers))
        return "[\n" + ",\n".join(lines) + "\n]\n"

    @property
    def setting(self) -> tuple[str, str, str]:
        return self.policy, self.manager, self.cache

    @property
    def label(self) -> str:
        return self.policy if self.manager == "blockwise" else f"{self.policy} ({self.manager})"

    @property
    def right(self) -> int:
        return self.hits.count("1")

    @property
    def share(self) -> float:
        return self.right / len(self.hits)

    @property
    def nfe(self) -> float:
        return sum(self.forwards) / len(self.forwards)

    def part(self, first: int) -> Row:
        """Every second question; of the rows that were computed, half."""
        cut = slice(first, None, 2)
        parts = {n: getattr(self, n)[cut] for n in ("hits", "same", "forwards", "tokens", "texts")}
        return replace(self, rows=self.rows // 2, seconds=self.seconds / 2, **parts)

    def summary(self) -> str:
        return f"{self.label} {self.cache}: {self.share:.1%}, {self.nfe:.2f} forwards, {self.seconds} s"


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    p, whole = right / count, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / whole
    half = z / whole * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def difference(pairs: Sequence[tuple[Row, Row]]) -> tuple[float, float, float]:
    """Accuracy of the second less the first, paired by question: mean, and 95 % of a bootstrap.

    Several pairs on the same questions are one sample of questions, not more of them.
    """
    each = np.mean([_digits(b.hits) - _digits(a.hits) for a, b in pairs], axis=0)
    drawn = np.random.default_rng(0).integers(0, len(each), (DRAWS, len(each)))
    low, high = np.quantile(each[drawn].mean(1), (0.025, 0.975))
    return float(each.mean()), float(low), float(high)


def _digits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64) - ord("0")


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """The rows that none beats: less cost and at least as many right, or as little and more."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row), -row.right)):
        if not best or row.right > best[-1].right:
            best.append(row)
    return best


COSTS: Mapping[str, Callable[[Row], float]] = {
    "NFE": lambda row: row.nfe,
    "rows": lambda row: row.rows / len(row.hits),
}


def models_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by model, in their order; the first of each is its reference."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """A part a model, then what was chosen and confirmed, then what each policy and cache changes."""
    models = models_of(rows)
    parts = [_of_model(name, found) for name, found in models.items()]
    return "\n\n".join([*parts, _choices(models), _policies(models), _caches(models)]) + "\n"


def _of_model(name: str, rows: Sequence[Row]) -> str:
    """The reference first, then by rows; = within the reference's interval; the fronts."""
    first = rows[0]
    low = wilson(first.right, len(first.hits))[0]
    fronts = {cost: front(rows, of) for cost, of in COSTS.items()}
    lines = [
        f"{name}: {len(first.hits)} questions; reference {first.label}, {first.cache}",
        f"{'policy':26}{'cache':14}{'right':>7}{'95 %':>15}{'NFE':>7}{'of ref':>8}{'TPF':>7}"
        f"{'rows':>7}{'of ref':>8}{'same':>8}{'tok/s':>7}  front",
    ]
    for row in [first, *sorted(rows[1:], key=COSTS["rows"])]:
        lower, upper = wilson(row.right, len(row.hits))
        marks = " ".join(cost for cost, best in fronts.items() if row in best)
        lines.append(
            f"{row.label:26}{row.cache:14}{row.share:7.1%}{f'{lower:.1%} {upper:.1%}':>15}"
            f"{row.nfe:7.2f}{row.nfe / first.nfe:8.2f}"
            f"{sum(row.tokens) / sum(row.forwards):7.2f}"
            f"{COSTS['rows'](row):7.0f}{row.rows / first.rows:8.2f}"
            f"{row.same.count('1') / len(row.same):8.1%}{sum(row.tokens) / row.seconds:7.0f}"
            f"{'  =' if row.share >= low else '   '} {marks}".rstrip()
        )
    return "\n".join(lines)


def choose(models: Mapping[str, Sequence[Row]], cost: str, reuse: bool) -> tuple[str, str, str]:
    """The cheapest setting that every model answers with as well as its reference does.

    As well: the paired 95 % interval of what it loses ends above the margin. That its share is within the
    reference's own interval would take the luckiest of many settings at the interval's edge. Cheapest: by
    the mean over models of the share of the reference's cost; `reuse`: a cache may leave rows out.
    """
    shares: dict[tuple[str, str, str], list[float]] = {}
    for rows in models.values():
        first = rows[0]
        for row in rows:
            if difference([(first, row)])[1] >= -MARGIN and (reuse or row.cache == "none"):
                part = COSTS[cost](row) / COSTS[cost](first)
                shares.setdefault(row.setting, []).append(part)
    everywhere = {key: sum(v) for key, v in shares.items() if len(v) == len(models)}
    return min(everywhere, key=lambda key: (everywhere[key], key))


def _choices(models: Mapping[str, Sequence[Row]]) -> str:
    lines = ["chosen by the even questions of all models, and what the odd ones say to it"]
    lines.append(
        f"{'cheapest by':12}{'reuse':7}{'policy':26}{'cache':14}{'model':10}{'right':>7}{'ref':>7}"
        f"{'less ref, 95 %':>22}{'NFE of ref':>12}{'rows of ref':>13}"
    )
    even, odd = (
        {name: [row.part(half) for row in rows] for name, rows in models.items()} for half in (0, 1)
    )
    for cost in COSTS:
        for reuse in (False, True):
            chosen = choose(even, cost, reuse)
            for name, rows in odd.items():
                row = next(row for row in rows if row.setting == chosen)
                mean, low, high = difference([(rows[0], row)])
                lines.append(
                    f"{cost:12}{'yes' if reuse else 'no':7}{row.label:26}{row.cache:14}{name:10}"
                    f"{row.share:7.1%}{rows[0].share:7.1%}"
                    f"{f'{mean:+.1%} ({low:+.1%} {high:+.1%})':>22}"
                    f"{row.nfe / rows[0].nfe:12.2f}{row.rows / rows[0].rows:13.2f}"
                )
    return "\n".join(lines)


def _policies(models: Mapping[str, Sequence[Row]]) -> str:
    """Each policy against `threshold` of the same threshold (0.9 where it has none), cache none."""
    lines = [
        "policies against threshold of about the same threshold, cache none",
        f"{'policy':26}{'against':16}{'model':10}{'accuracy less its':>24}{'NFE of its':>12}",
    ]
    for name, rows in models.items():
        plain = {
            row.policy: row for row in rows if row.cache == "none" and row.manager == "blockwise"
        }
        for row in rows:
            against = plain.get(_counterpart(row.policy))
            if row.cache != "none" or against is None or row.policy == against.policy == row.label:
                continue
            mean, low, high = difference([(against, row)])
            lines.append(
                f"{row.label:26}{against.policy:16}{name:10}"
                f"{f'{mean:+.1%} ({low:+.1%} {high:+.1%})':>24}{row.nfe / against.nfe:12.2f}"
            )
    return "\n".join(lines)


def _counterpart(policy: str) -> str:
    kind, *numbers = policy.split()
    value = float(numbers[0]) if numbers and kind not in ("factor", "steps") else 0.9
    near = min((0.5, 0.7, 0.8, 0.9, 0.95), key=lambda t: abs(t - value))
    return f"threshold {near:g}"


def _caches(models: Mapping[str, Sequence[Row]]) -> str:
    """Each cache against `none`, over the settings that both have."""
    lines = [
        "caches against none, mean over the blockwise settings",
        f"{'cache':14}{'model':10}{'settings':>9}{'accuracy less its':>24}{'NFE of its':>12}"
        f"{'rows of its':>13}",
    ]
    for name, rows in models.items():
        by_setting = {row.setting: row for row in rows if row.manager == "blockwise"}
        for cache in dict.fromkeys(row.cache for row in rows if row.cache != "none"):
            pairs = [
                (by_setting[key[0], key[1], "none"], row)
                for key, row in by_setting.items()
                if key[2] == cache and (key[0], key[1], "none") in by_setting
            ]
            mean, low, high = difference(pairs)
            ratios = [np.mean([of(b) / of(a) for a, b in pairs]) for of in COSTS.values()]
            lines.append(
                f"{cache:14}{name:10}{len(pairs):9}{f'{mean:+.1%} ({low:+.1%} {high:+.1%})':>24}"
                f"{ratios[0]:12.2f}{ratios[1]:13.2f}"
            )
    return "\n".join(lines)
