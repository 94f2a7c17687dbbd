"""Tables and a plot of the results so far, into README.md between its markers, and accuracy.png."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
COLUMNS = {
    "sum": "sum",
    "digit1": "1st digit",
    "digit2": "2nd",
    "digit3": "3rd",
    "bits_per_byte": "bits per byte",
}
PLOTTED = (
    ("sum", "whole sum", "tab:blue", 0.26),
    ("digit1", "first digit", "tab:orange", 0.0),
    ("digit2", "second digit", "tab:green", -0.26),
)


def write(results: list[dict]) -> None:
    """Update README.md and the plot."""
    from student import RUNS
    from world import REGIMES

    groups: dict[tuple, list[dict]] = defaultdict(list)
    for result in results:
        # A student without a teacher is run once, and stands in the tables of both.
        for regime in REGIMES if result["name"] == "none" else [result["regime"]]:
            groups[regime, result["wrong_share"], result["name"]].append(result)
    names = [run.name for run in RUNS]
    readme = HERE / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = "\n\n".join(_tables(groups, names))
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")
    _plot(groups, names)


def _tables(groups: dict[tuple, list[dict]], names: list[str]):
    for regime, share in sorted({key[:2] for key in groups}, key=lambda key: (-key[1], key[0])):
        lines = [
            f"Teacher {regime}, {share:.0%} of the sums wrong:",
            "",
            "| loss | seeds | " + " | ".join(COLUMNS.values()) + " | factor | capped |",
            "|---|---|" + "---|" * (len(COLUMNS) + 2),
        ]
        for name in names:
            found = groups.get((regime, share, name))
            if not found:
                continue
            cells = [_spread([result[column] for result in found]) for column in COLUMNS]
            factor = "" if name == "none" else f"{np.mean([r['factor'] for r in found]):.2f}"
            capped = f"{np.mean([r['capped'] for r in found]):.0%}" if "dynamic" in name else ""
            lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + f" | {factor} | {capped} |")
        yield "\n".join(lines)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def _plot(groups: dict[tuple, list[dict]], names: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    regimes = sorted({key[0] for key in groups if key[1] == 0.7})
    figure, axes = plt.subplots(
        1, len(regimes), figsize=(6.5 * len(regimes), 6.5), sharey=True, squeeze=False
    )
    for axis, regime in zip(axes[0], regimes, strict=True):
        shown = [name for name in names if (regime, 0.7, name) in groups]
        for place, name in enumerate(reversed(shown)):
            found = groups[regime, 0.7, name]
            for column, label, colour, shift in PLOTTED:
                values = [result[column] for result in found]
                axis.barh(
                    place + shift, np.mean(values), 0.26, color=colour, alpha=0.6,
                    label=label if place == 0 else None,
                )  # fmt: skip
                axis.plot(values, [place + shift] * len(values), "k.", markersize=3)
        axis.set_yticks(range(len(shown)), list(reversed(shown)))
        axis.set_xlim(0, 1)
        axis.set_xlabel("accuracy on held-out sums; a dot is a seed")
        axis.set_title(f"teacher {regime}, 70% of the sums in the text wrong")
    # Bars may end anywhere, so the legend stands above them.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(PLOTTED))
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(HERE / "accuracy.png", dpi=110)
