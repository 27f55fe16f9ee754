"""Draws a generation of the shipped model, forward by forward, as `docs/denoising.svg`.

    dcompile dcompile/demo/model -o demo.dcx --block-length 16 --max-length 128
    python docs/denoising.py demo.dcx docs/denoising.svg

The threshold is far above the model's own, so that there is something to see: with its own, this
model decides a block in one or two forwards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from dcompile.profile.watch import Observer, Seen
from dcompile.runtime.decode.loop import Runner

PROMPT = "reverse: To, some, Mediterranean ="
LENGTH, THRESHOLD = 32, 0.99
CELL, HEIGHT, LEFT, TOP = 19, 28, 92, 44
STYLE = """
text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #24292f }
.cell { text-anchor: middle } .note { fill: #6e7781; font-size: 12px } .new { font-weight: bold }
.end { fill: #8c959f } .mask { fill: #d0d7de } .box { fill: #ffd33d; fill-opacity: 0.6 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note { fill: #9198a1 } .end { fill: #7d8590 } .mask { fill: #3d444d }
.box { fill: #bb8009; fill-opacity: 0.6 } }
"""


def watched(path: Path) -> tuple[list[Seen], int, Runner]:
    """Every forward of the generation, and where the generated positions begin."""
    runner = Runner.load(path, threads=1)
    begin = len(runner.encode(PROMPT))
    watch = runner.watch = Observer(runner.executor, {})
    runner.generate([PROMPT], gen_length=LENGTH, threshold=THRESHOLD)
    return watch.iterations, begin, runner


def row(at: int, forward: Seen | None, tokens: list[int], old: list[int], runner: Runner) -> str:
    """One line of the picture: a cell a position, what this forward decided marked."""
    y = TOP + at * HEIGHT
    parts = [f'<text x="0" y="{y}">{"all masks" if forward is None else f"forward {at}"}</text>']
    decided = 0
    for place, (token, before) in enumerate(zip(tokens, old, strict=True)):
        x = LEFT + place * CELL
        if token == runner.limits.mask_id:
            parts.append(
                f'<rect class="mask" x="{x + 3}" y="{y - 13}" width="13" height="16" rx="2"/>'
            )
            continue
        new = token != before
        decided += new
        if new:
            parts.append(
                f'<rect class="box" x="{x}" y="{y - 16}" width="{CELL}" height="22" rx="3"/>'
            )
        end = token in runner.limits.eos_ids
        text = "$" if end else escape(runner.decode([token]) or "")
        kind = f"cell{' new' if new else ''}{' end' if end else ''}"
        parts.append(f'<text class="{kind}" x="{x + CELL / 2}" y="{y}">{text}</text>')
    if forward is not None:
        noted = f"{decided} decided, {forward.R} rows"
        parts.append(f'<text class="note" x="{LEFT + LENGTH * CELL + 10}" y="{y}">{noted}</text>')
    return "\n".join(parts)


def picture(path: Path) -> str:
    """The whole generation as SVG, readable on a light and on a dark page."""
    forwards, begin, runner = watched(path)
    span = slice(begin, begin + LENGTH)
    lines = [f'<text x="0" y="16">{escape(PROMPT)}</text>']
    old: list[int] = forwards[0].before[0, span].tolist()
    lines.append(row(0, None, old, old, runner))
    for at, forward in enumerate(forwards, 1):
        tokens: list[int] = forward.after[0, span].tolist()
        lines.append(row(at, forward, tokens, old, runner))
        old = tokens
    wide, high = LEFT + LENGTH * CELL + 160, TOP + len(forwards) * HEIGHT + 14
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img">\n'
        f"<title>A generation being denoised, forward by forward</title>\n"
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(Path(sys.argv[1])))
