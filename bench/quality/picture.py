"""What `policies.py` measured, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from table import COSTS, Row, front, models_of, wilson


def picture(rows: Sequence[Row], stem: Path) -> None:
    """Accuracy against forwards and against rows, a line of panels a model, the fronts drawn.

    What is far below the reference is counted, not drawn: it would flatten the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    matplotlib.rcParams["svg.hashsalt"] = "dcompile"
    models = models_of(rows)
    policies = list(dict.fromkeys(row.policy.split()[0] for row in rows))
    markers = dict(zip(dict.fromkeys(row.cache for row in rows), "osD^vPX", strict=False))
    colours = plt.get_cmap("tab20").colors[:: 2 if len(policies) <= 10 else 1]
    figure, panels = plt.subplots(len(models), 2, figsize=(13, 5 * len(models)), squeeze=False)
    for (model, found), pair in zip(models.items(), panels, strict=True):
        low, high = wilson(found[0].right, len(found[0].hits))
        for panel, (cost, of) in zip(pair, COSTS.items(), strict=True):
            panel.axhspan(low, high, color="0.93", label="reference, 95 %")
            for row in found:
                panel.scatter(
                    of(row),
                    row.share,
                    marker=markers[row.cache],
                    color=colours[policies.index(row.policy.split()[0])],
                    edgecolors="none" if row.manager == "blockwise" else "black",
                    s=28,
                    alpha=0.8,
                )
            best = front(found, of)
            panel.plot([of(r) for r in best], [r.share for r in best], color="0.3", linewidth=1)
            panel.set(xscale="log", xlabel=f"{cost} a question", ylabel="exact match", title=model)
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_locator(NullLocator())
            floor = low - 0.12
            panel.set_ylim(floor, min(high + 0.03, 1.01))
            below = sum(row.share < floor for row in found)
            if below:
                panel.text(0.02, 0.02, f"{below} below", transform=panel.transAxes, color="0.4")
    kinds = [
        plt.Line2D([], [], linestyle="", marker="o", color=colours[i], label=policy)
        for i, policy in enumerate(policies)
    ]
    kinds += [
        plt.Line2D([], [], linestyle="", marker=mark, color="0.4", label=cache)
        for cache, mark in markers.items()
    ]
    kinds.append(plt.Line2D([], [], color="0.3", linewidth=1, label="front"))
    ringed = {"markerfacecolor": "0.8", "markeredgecolor": "black"}
    kinds.append(plt.Line2D([], [], linestyle="", marker="o", label="whole canvas", **ringed))
    figure.legend(handles=kinds, loc="lower center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(stem.with_suffix(".png"), dpi=110, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
