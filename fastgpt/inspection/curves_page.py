"""Writes the curves of runs as one HTML page: a table of the runs, and the panels as pictures that follow the theme.

The page is self-contained and has no script. Its pictures are SVG by matplotlib, in which the colors of the text and of
each run are replaced by those of the page, so that they are readable on a light and on a dark one.
"""

import html
import io
import re
from collections.abc import Sequence
from string import Template

import numpy as np

from fastgpt.inspection import history
from fastgpt.inspection.panels import COLORS, Panel, Run, paint
from fastgpt.system.units import counted, format_duration

SIZE = (5.0, 3.3)  # inches of a panel
INK = "#0a0b0c"  # stands for the color of the page's text

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c1c1e; --quiet: #5d5d66; --rule: #d9d9de; $light }
@media (prefers-color-scheme: dark) {
  :root { --page: #16171a; --ink: #e8e8ea; --quiet: #a5a5ae; --rule: #3a3b40; $dark }
}
body { margin: 0 auto; padding: 1rem; max-width: 100rem; background: var(--page); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
p { color: var(--quiet); margin: .5rem 0; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
th { color: var(--quiet); font-weight: 600; }
.color { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
          margin-top: 1rem; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg text { font-family: system-ui, sans-serif; }
</style>
</head>
<body>
<h1>$title</h1>
<div class="wide" tabindex="0" role="region" aria-label="the runs">
<table>
<thead><tr>$heads</tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
<p>$key</p>
<main class="panels">
$panels
</main>
</body>
</html>
""")


def page(runs: Sequence[Run], panels: Sequence[Panel], smooth: float | None) -> str:
    """The page of the runs; every text of theirs is escaped."""
    names = history.differences([run.history for run in runs])
    folders = history.folders([run.history for run in runs])
    rows = [{"run": folder} | _facts(run, names) for folder, run in zip(folders, runs, strict=True)]
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0])
    return PAGE.substitute(
        title=html.escape(folders[0] if len(runs) == 1 else counted(len(runs), "run")),
        light=_variables(0),
        dark=_variables(1),
        heads=heads,
        rows="\n".join(_row(run, row) for run, row in zip(runs, rows, strict=True)),
        key=_key(panels, len(runs), smooth),
        panels="\n".join(_svg(panel, runs, smooth, number) for number, panel in enumerate(panels)),
    )


def _variables(theme: int) -> str:
    return " ".join(f"--run-{number}: {pair[theme]};" for number, pair in enumerate(COLORS))


def _facts(run: Run, names: Sequence[str]) -> dict[str, str]:
    """A row of the table of runs: what it has reached, and the settings that differ."""
    records = run.history
    (steps, val), (_, loss), (_, speed) = records.val_curve(), records.curve("loss"), records.curve("tokens_per_second")
    best = int(np.argmin(val)) if val.size else None
    return {
        "best val loss": "-" if best is None else f"{val[best]:.4f} at step {steps[best]:,}",
        **{name: history.value(records, name) if records.settings else "unknown" for name in names},
        "steps": f"{records.steps:,}",
        "last train loss": f"{loss[-1]:.4f}" if loss.size else "-",
        "tokens/s (median)": f"{np.median(speed):,.0f}" if speed.size else "-",
        "wall time": "-" if records.seconds is None else format_duration(records.seconds),
    }


def _row(run: Run, row: dict[str, str]) -> str:
    color = f'<span class="color" style="background: var(--run-{run.number % len(COLORS)})"></span>'
    first, *rest = (html.escape(text) for text in row.values())
    return f"<tr><td>{color}{first}</td>{''.join(f'<td>{text}</td>' for text in rest)}</tr>"


def _key(panels: Sequence[Panel], runs: int, smooth: float | None) -> str:
    """The kinds of lines in words."""
    lines = "" if smooth == 0 else "Solid lines are running means, with the values faint behind them. "
    val = "Val losses are markers on a dashed line, which breaks where the evaluation set changes."
    by_layer = runs > 1 and any(panel.title.endswith("by layer") for panel in panels)
    bands = " By layer: the median of the layers, in a band from the lowest to the highest." if by_layer else ""
    return f"{lines}{val} Wall time includes compiling, evaluating and saving.{bands}"


def _svg(panel: Panel, runs: Sequence[Run], smooth: float | None, number: int) -> str:
    """A panel as an element of the page, in the page's colors, and without names that another panel uses too."""
    import matplotlib
    from matplotlib.figure import Figure

    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"panel {number}", **inks}):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        paint(axes, panel, runs, smooth)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = content.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for at, (light, _) in enumerate(COLORS):
        text = text.replace(light, f"var(--run-{at})")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(panel.title)}" ', 1).strip()
