"""The report of one run: convergence, scores and mistakes, paths of pixels through code space, speed of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

from flowseg.config import Config, shortened
from flowseg.data import SegmentationData, open_data
from flowseg.data.presets import Labels
from flowseg.errors import UserError
from flowseg.inference.evaluate import Scores, chosen_indices, evaluate
from flowseg.report import figures
from flowseg.report.blocks import environment, speed_blocks
from flowseg.report.names import captioned
from flowseg.report.page import Page, folded, paragraph, picture, search_table, table
from flowseg.report.speed import measure_kernels
from flowseg.runs.metrics import read_metrics
from flowseg.segment import Segmenter

# A legend of more classes does not fit into one line.
_MOST_IN_LEGEND = 25

# Pictures of all classes and pairs of classes have at most this many; above, the report has tables and selections.
_MOST_IN_PICTURES = 255
_MOST_NOTABLE, _MOST_CONFUSED = 20, 50

# Cards about training: name in the metrics, format, how the lines become one number, meaning.
_SPEEDS = (
    ("images_per_second", "{:.1f}", np.median, "images per second in training (median)"),
    ("model_tflops_per_second", "{:.3g}", np.median, "model TFLOP/s of each device in training (median)"),
    ("data_wait_share", "{:.0f} %", lambda shares: 100 * np.median(shares), "of the time waiting for data (median)"),
    ("memory_gib", "{:.1f} GiB", np.max, "of device memory at most"),
)


def write_report(
    run: Path,
    segmenter: Segmenter,
    out: Path,
    *,
    limit: int | None = None,
    examples: int = 4,
    kernel_size: int | None = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Score a run on its validation split and write ``out``, one HTML file.

    Args:
        run: folder written by training; the report reads its ``metrics.jsonl``.
        segmenter: the network of the run.
        out: file to write.
        limit: score only this many images.
        examples: number of images in the grid, evenly spread over the split.
        kernel_size: side of the image on which kernels are timed; ``None``: time no kernels.
        on_batch: called with the number of images of each finished batch.

    Raises:
        UserError: a run without metrics, or data that cannot be opened.
    """
    config = segmenter.config
    metrics = _read_metrics(run / "metrics.jsonl")
    data = open_data(config.data, ("val",), seed=config.train.seed)
    scores = evaluate(segmenter, data.val, limit=limit, on_batch=on_batch)
    training = [line for line in metrics if line["event"] == "train"]
    page = Page(f"FlowSeg run: {run.resolve().name}", _summary(config, data.labels))
    page.cards(_cards(scores, training))
    if training:
        curve = [(line["step"], line["miou"]) for line in metrics if line["event"] == "validation"]
        page.section("Convergence", *_convergence(config, training, curve))
    _add_scores(page, scores, data.labels)
    indices = chosen_indices(len(data.val), examples)
    page.section("Examples", *_examples(segmenter, data, indices))
    page.section("Through code space", *_code_space(segmenter, data, indices[0]))
    if kernel_size:
        page.section("Speed of the kernels", *speed_blocks(measure_kernels(kernel_size, repeats=3), kernel_size))
    page.section(
        "Settings and versions",
        paragraph("; ".join(f"{key} {value}" for key, value in environment().items())),
        folded("All settings", yaml.safe_dump(_settings(config), sort_keys=False)),
    )
    page.write(out)
    return scores


def _settings(config: Config) -> dict:
    """All settings as plain values; lists of many classes are shortened."""
    tree = config.model_dump(mode="json")
    return {section: {key: shortened(value) for key, value in fields.items()} for section, fields in tree.items()}


def _read_metrics(path: Path) -> list[dict]:
    try:
        return read_metrics(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); RUN must be a folder written by training"
        ) from None


def _summary(config: Config, labels: Labels) -> str:
    weight, steps = config.loss.correction_weight, config.sample.steps
    method = "plain flow matching" if weight == 0 else f"flow matching with the correction at weight {weight:g}"
    return (
        f"{config.model.size} on {config.data.name}, {len(labels.classes)} classes, {config.codes.channels} code channels, "
        f"{method}, {steps} {config.sample.method.capitalize()} step{'s' * (steps > 1)}."
    )


def _cards(scores: Scores, training: list[dict]) -> list[tuple[str, str]]:
    cards = [
        (f"{scores.miou:.1f} %", f"mIoU on {scores.images} validation images"),
        (f"{scores.pixel_accuracy:.1f} %", "of labelled pixels right"),
        (f"{training[-1]['step'] if training else 0}", "training steps"),
    ]
    # Earlier versions logged only the images per second, and a CPU has no count of its memory.
    for name, text, reduce, meaning in _SPEEDS:
        values = [line[name] for line in training if name in line]
        if values:
            cards.append((text.format(float(reduce(values))), meaning))
    return cards


def _convergence(config: Config, training: list[dict], curve: list[tuple[int, float]]) -> list[str]:
    errors = [(line["step"], line["squared_error"]) for line in training]
    title = f"validation mIoU during training, {config.train.eval_images or 'all'} images"
    return [
        picture(figures.curve_figure({"run": curve}, {"run": errors}, title), "convergence"),
        paragraph(
            "The loss includes the correction, so it cannot be compared between settings; the plain squared error can."
        ),
    ]


def _add_scores(page: Page, scores: Scores, labels: Labels) -> None:
    if len(labels.classes) > _MOST_IN_PICTURES:
        _add_scores_of_many(page, scores, labels)
        return
    page.section(
        "Scores by class",
        picture(figures.iou_figure(labels.classes, scores.iou, labels.palette), "IoU by class"),
        _class_table(scores, labels.classes),
    )
    page.section(
        "Confusion of classes",
        picture(figures.confusion_figure(scores.confusion.numpy(), labels.classes), "confusion matrix"),
        paragraph("Each row is one true class and sums to 100 %."),
    )


def _add_scores_of_many(page: Page, scores: Scores, labels: Labels) -> None:
    """Scores and confusions of more classes than pictures can show: some classes, a search box, and the most confused pairs."""
    names = labels.classes
    blocks = [
        paragraph("Number of classes by IoU, then the most frequent, the best and the worst classes."),
        picture(figures.iou_histogram(scores.iou), "number of classes by IoU"),
    ]
    for title, chosen in scores.notable(_MOST_NOTABLE).items():
        shown = figures.iou_figure(names, scores.iou, labels.palette, chosen)
        blocks += [paragraph(f"{title.capitalize()} classes:"), picture(shown, f"IoU of the {title} classes")]
    frequent = scores.counts[1].argsort(descending=True, stable=True).tolist()
    rows = _class_rows(scores, names)
    blocks += [paragraph("All classes, the most frequent first:"), search_table(_COLUMNS, [rows[k] for k in frequent])]
    page.section("Scores by class", *blocks)
    missing = scores.missing_pixels
    exact = f"A count may lack up to {missing} pixels." if missing else "The counts are exact."
    captions, truths = captioned(names), scores.counts[1].tolist()
    confused = [
        [captions[true], captions[found], f"{pixels}", f"{100 * pixels / truths[true]:.1f}"]
        for true, found, pixels in scores.most_confused(_MOST_CONFUSED)
    ]
    page.section(
        "Confusion of classes",
        paragraph(
            f"The most frequent pairs of a true class and another class that was predicted for its pixels. {exact}"
        ),
        table(["truth", "prediction", "pixels", "of the true class, %"], confused),
    )


_COLUMNS = ["class", "IoU, %", "found (recall), %", "predictions right (precision), %", "of all pixels, %"]


def _class_table(scores: Scores, classes: tuple[str, ...]) -> str:
    return table(_COLUMNS, _class_rows(scores, classes))


def _class_rows(scores: Scores, classes: tuple[str, ...]) -> list[list[str]]:
    """A row of ``_COLUMNS`` for each class."""
    hits, truths, predictions = scores.counts.tolist()
    total = sum(truths)

    def percent(part: int, of: int) -> str:
        return f"{100 * (part / of):.1f}" if of > 0 else "absent"

    return [
        [
            name,
            "absent" if scores.iou[k] is None else f"{scores.iou[k]:.1f}",
            percent(hits[k], truths[k]),
            percent(hits[k], predictions[k]),
            percent(truths[k], total),
        ]
        for k, name in enumerate(captioned(classes))
    ]


def _examples(segmenter: Segmenter, data: SegmentationData, indices: list[int]) -> list[str]:
    labels = data.labels
    rows = [_example(segmenter, data, index) for index in indices]
    blocks = [
        paragraph("Evenly spread over the validation split, not selected. Black pixels have no label."),
        picture(figures.grid_figure(rows, labels.palette), "examples"),
    ]
    if len(labels.classes) <= _MOST_IN_LEGEND:
        blocks.append(picture(figures.legend_figure(labels.classes, labels.palette), "colours of the classes"))
    return blocks


def _example(segmenter: Segmenter, data: SegmentationData, index: int) -> dict:
    image, truth = data.val[index]
    found, margin = segmenter.labels(image, with_margin=True)
    spacing = segmenter.codebook.min_distance
    share = np.clip(margin.numpy() / spacing, 0, 1) if np.isfinite(spacing) else np.ones(margin.shape)
    return {"image": np.asarray(image), "truth": np.asarray(truth), "labels": found.numpy(), "margin": share}


def _code_space(segmenter: Segmenter, data: SegmentationData, index: int) -> list[str]:
    count = _path_steps(segmenter.config)
    return [
        paragraph(
            "Paths of some pixels of the first example from the image (t = 0) to a code (t = 1), in the plane in which the "
            "codes vary most. Stars are the codes of the classes in the picture, circles the other codes; a path has the "
            f"colour of its true class. The solver takes {count} step{'s' * (count > 1)} here. With more than two channels, "
            "points that are close in the plane need not be close in code space."
        ),
        picture(_trajectories(segmenter, data, index), "trajectories"),
    ]


def _path_steps(config: Config) -> int:
    """Solver steps for the figure: at least 8, to show bends; 1 if training saw only t = 0."""
    return 1 if config.flow.zero_fraction == 1.0 else max(8, config.sample.steps)


def _trajectories(segmenter: Segmenter, data: SegmentationData, index: int) -> Figure:
    image, truth = data.val[index]
    pixels, (height, width) = segmenter.prepare_batch([image])
    _, path = segmenter.sample(pixels, steps=_path_steps(segmenter.config), keep_path=True)
    truth = np.asarray(truth.resize((width, height), 0))
    states = [(t, x[0, :, :height, :width]) for t, x in path]
    return figures.trajectory_figure(states, truth, segmenter.codebook.centroids.cpu().numpy(), data.labels.palette)
