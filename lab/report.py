"""Write results.csv, results.md and report.html, a page that needs no other file."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from data.voc import Sample, read_class_names, scan_split
from lab.plan import Plan, read_json, write_text
from lab.plots import (
    choose_images,
    draw_detected,
    draw_truth,
    plot_cells,
    plot_learning_curves,
    plot_shares,
)
from lab.results import Result, read_results, write_csv
from lab.sources import settings_difference
from lab.tables import Table, all_tables
from metrics.calibration import CALIBRATION_FLOOR
from utils.errors import UserError

JPEG_QUALITY = 80
HOW_TO_READ = (
    "± is the sample standard deviation over the seeds. A difference is the mean over the seeds "
    "of loss minus first loss at the same seed, which gives both the same initial weights (but "
    "for a declared prior) and the same batches, so it pairs the seeds that both have finished; in "
    'brackets its 95% confidence interval (Student\'s t). "yes": 0 lies outside it, the difference '
    "exceeds the noise between seeds; of twenty comparisons without any difference, one says yes "
    "by chance.",
    "AP50: VOC, all points; AP: COCO, .50 to .95. best F1 and its score are chosen on the test "
    "split itself; F1 as stored is what detection gives at the threshold stored in the "
    "checkpoint, which the validation split has chosen. ECE: expected calibration error of the "
    f"boxes of score {CALIBRATION_FLOOR:g} or more. ms a step: median over epochs, as fast as the "
    'machine was just then. A "-" was not measured: no run is finished, or none has a box of '
    "such a score (ECE), or the split has no object of the class.",
)
# Title, file, how it is drawn, caption.
FIGURES = (
    (
        "Learning curves",
        "learning_curves.png",
        plot_learning_curves,
        "Mean over the seeds; the band reaches from the lowest seed to the highest.",
    ),
    (
        "Easy and hard cells",
        "cumulative_loss.png",
        plot_cells,
        "Cells of the validation split at the last evaluation, sorted from easy to hard: which "
        "share of the confidence loss they have up to there (Lin et al. 2017, figure 4).",
    ),
    (
        "Whose gradient it is",
        "gradient_shares.png",
        plot_shares,
        "Shares of the sum of |d conf / d logit| over the training cells, mean over the seeds.",
    ),
)
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #fff; --soft: #f3f4f6; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --back: #15181c; --soft: #22272e; --line: #3d444d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 .5rem; }
pre { padding: .75rem; background: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back);
  text-align: left; min-width: 8.5rem; max-width: 14rem; white-space: normal;
  overflow-wrap: break-word; }
.yes { font-weight: 700; } .small { display: block; font-size: .8em; opacity: .75; }
figure { margin: 1rem 0; }
figure img { min-width: 36rem; max-width: 100%; background: #fff; padding: .5rem; }
.images { display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.images img { width: 100%; }
"""


def write_reports(plan: Plan, save_dir: Path, *, left_out: Sequence[str] = ()) -> list[str]:
    """Write all reports of what the runs have left so far.

    Args:
        left_out: Losses of the folder that the plan does not hold.

    Returns:
        Notes that a reader of the reports needs.
    """
    results = read_results(plan, save_dir)
    write_csv(save_dir / "results.csv", results)
    grouped = {loss: [own for own in results if own.run.loss == loss] for loss in plan.losses}
    drawn = [
        (title, name, caption)
        for title, name, plot, caption in FIGURES
        if plot(save_dir / name, grouped)
    ]
    tables = all_tables(plan, save_dir, results)
    notes = settings_notes(grouped)
    if left_out:
        notes.append(f"Left out of this report: {', '.join(left_out)}.")
    head = [summary(plan, results), *notes]
    write_text(save_dir / "results.md", markdown(plan, save_dir, head, tables, drawn))
    sections = [figure_section(save_dir, *figure) for figure in drawn]
    sections.append(images_section(plan, grouped))
    write_text(save_dir / "report.html", page(plan, save_dir, head, tables, sections))
    return notes


def summary(plan: Plan, results: Sequence[Result]) -> str:
    """A sentence on what was compared, and how many runs are finished."""
    done, total = sum(result.finished for result in results), len(results)
    version = f", version {plan.version}" if plan.version else ""
    seeds = ", ".join(map(str, plan.seeds))
    return (
        f"{done} of {total} runs are finished: {len(plan.losses)} confidence losses, "
        f"seeds {seeds}; epochs of each: {plan.epochs}; tested on {plan.test}{version}."
    )


def settings_notes(grouped: Mapping[str, Sequence[Result]]) -> list[str]:
    """Notes on losses whose runs were not all trained with the same settings."""
    losses: dict[str, list[str]] = {}
    for loss, results in grouped.items():
        begun = (result for result in results if result.begun)
        found = settings_difference({f"seed {own.run.seed}": own.settings for own in begun})
        losses.setdefault(found, []).append(loss)
    notes = []
    for found, own in losses.items():
        verb = "may differ" if found.startswith("not recorded") else "differ"
        if found:
            notes.append(f"Settings {verb} between the seeds of {', '.join(own)}: {found}.")
    return notes


def markdown(
    plan: Plan,
    save_dir: Path,
    head: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[tuple[str, str, str]],
) -> str:
    """The text of results.md; its images lie beside it."""
    parts = ["# Confidence losses compared", *head, f"```sh\n{plan.command(save_dir)}\n```"]
    parts += [markdown_table(table) for table in tables]
    parts += HOW_TO_READ
    parts += [f"## {title}\n\n![{title}]({name})\n\n{caption}" for title, name, caption in figures]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table under its title."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    escaped = (
        [html.escape(cell, quote=False).replace("|", r"\|").replace("\n", "<br>") for cell in line]
        for line in lines
    )
    text = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
    return f"### {table.title}\n\n{text}"


def page(
    plan: Plan,
    save_dir: Path,
    head: Sequence[str],
    tables: Sequence[Table],
    sections: Sequence[str],
) -> str:
    """The text of report.html."""
    body = "\n".join(
        (
            "<h1>Confidence losses compared</h1>",
            *(f"<p>{html.escape(text)}</p>" for text in head),
            f"<pre>{html.escape(plan.command(save_dir))}</pre>",
            "<h2>On the test split</h2>",
            *(html_table(table) for table in tables),
            *(f"<p>{html.escape(text)}</p>" for text in HOW_TO_READ),
            *sections,
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Confidence losses compared</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def html_table(table: Table) -> str:
    """A table that scrolls sideways where the screen is narrow."""
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "\n".join(f"<tr>{''.join(map(html_cell, row))}</tr>" for row in table.rows)
    return (
        f"<h3>{html.escape(table.title)}</h3>\n"
        f'<div class="scroll"><table>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def html_cell(text: str) -> str:
    """A table cell: lines after the first and spreads are small, differences above noise bold."""
    first, *others = html.escape(text).replace(" ± ", "\n± ").split("\n")
    below = "".join(f'<span class="small">{line}</span>' for line in others)
    style = ' class="yes"' if text == "yes" or text.endswith(": yes") else ""
    return f"<td{style}>{first}{below}</td>"


def figure_section(save_dir: Path, title: str, name: str, caption: str) -> str:
    """A plot with its heading."""
    image = image_tag((save_dir / name).read_bytes(), "image/png", title)
    return (
        f'<h2>{title}</h2>\n<figure><div class="scroll">{image}</div>\n'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def image_tag(data: bytes, kind: str, alt: str) -> str:
    """An <img> tag that holds the image itself."""
    text = base64.b64encode(data).decode("ascii")
    return f'<img src="data:{kind};base64,{text}" alt="{html.escape(alt)}">'


def images_section(plan: Plan, grouped: Mapping[str, Sequence[Result]]) -> str:
    """The same test images: their objects, and what the first finished run of each loss finds."""
    finished = {loss: [own for own in results if own.finished] for loss, results in grouped.items()}
    chosen = [results[0] for results in finished.values() if results]
    if not chosen:
        return ""
    title = "<h2>The same images</h2>"
    config = read_json(chosen[0].run.folder / "config.json") or {}
    try:
        names = read_class_names(config["classes_path"])
        samples, _ = scan_split(plan.test, names, skip_bad=config["skip_bad"])
        samples = choose_images(samples)
        rows = [image_row("the objects", draw_truth(samples, names))]
    except (UserError, KeyError) as error:  # the data may have moved since
        return f"{title}\n<p>No images: {html.escape(str(error))}</p>"
    rows += [detected_row(result, samples) for result in chosen]
    note = "Each loss at the threshold stored in its checkpoint."
    return "\n".join((title, f"<p>{note}</p>", *rows))


def detected_row(result: Result, samples: Sequence[Sample]) -> str:
    """What a run detects, or why there is nothing to show."""
    try:
        images, which = draw_detected(result, samples)
    except UserError as error:  # best.pt may have gone
        return f"<h3>{html.escape(str(result.run))}</h3>\n<p>{html.escape(str(error))}</p>"
    return image_row(f"{result.run}: {which}", images)


def image_row(title: str, images: Sequence[np.ndarray]) -> str:
    """Images side by side under a heading; on a phone, two by two."""
    tags = "\n".join(
        image_tag(as_jpeg(image), "image/jpeg", f"{title}, image {number}")
        for number, image in enumerate(images, start=1)
    )
    return f'<h3>{html.escape(title)}</h3>\n<div class="images">\n{tags}\n</div>'


def as_jpeg(image_rgb: np.ndarray) -> bytes:
    """An RGB image as a JPEG file."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(".jpg", image_rgb[..., ::-1], options)
    return data.tobytes()
