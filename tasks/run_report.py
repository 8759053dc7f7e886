"""The `Report` of a finished run: which facts, samples and pictures are on its page."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flashtask.core.errors import FlashtaskError
from flashtask.core.names import shown_name
from flashtask.data.audit import label_errors
from flashtask.data.findings import KINDS, Finding, Sample
from flashtask.data.image_datamodule import ImageDataModule
from flashtask.data.page_style import picture_address
from flashtask.data.threads import in_threads
from flashtask.reports.evaluation import Evaluation
from flashtask.reports.history import History, phases_of
from flashtask.reports.judgement import Judged, Pair
from flashtask.reports.report import Album, Card, Report
from flashtask.reports.several import SeveralRuns, Tally
from flashtask.tasks.explanation import HEAT_MAPS, heat_maps, heated

if TYPE_CHECKING:
    from flashtask.tasks.finished_run import FinishedRun
    from flashtask.tasks.task import Task

__all__ = ["Pictures", "duration", "facts_of_run", "report_of"]

#: Pixels of the longer side of pictures: of samples that are looked at one by one, and of those in galleries.
_SIDE, _SMALL = 256, 128
#: Samples that are looked at one by one, pictures of a cell, of all cells, and of a kind of error or finding.
_WORST, _CELL, _CELLS, _KIND = 8, 12, 180, 8
#: Kinds of errors about objects, in the order of the page.
_KINDS = ("class", "localisation", "duplicate", "missed", "background")
#: A crop of an object shows so much more of the picture around it, as a share of its longer side.
_AROUND = 0.5


def report_of(run: FinishedRun, part: str | None = None, slices: Sequence[str] | None = None) -> Report:
    """Judge the model on its validation data, and choose what the page shows.

    Args:
        run: finished.
        part: `val` or `test`; None means validation data, else test data.
        slices: columns that the samples are sliced by; None means all.

    Raises:
        UnknownNameError: no sample has such a column.
    """
    task, remark = run.task, ""
    data, evaluation = None, None
    try:
        data = run.data
        known = data.sizes() if isinstance(data, ImageDataModule) else {}
        part = part or next((one for one in ("val", "test") if one in known), None)
        if part is None:
            remark = (
                "There is no validation data to judge the model on: flashtask report RUN DATA shows it on other data."
            )
        else:
            evaluation = run.evaluation(part)
    except FlashtaskError as error:
        remark = f"The model could not be judged: {error.what}"
    title = f"{run.summary.get('backbone') or task.name}: {run.folder.name if run.is_folder else run.path.name}"
    made = Report(
        title, facts_of_run(run, data), _command(run), run.history, run.metrics, task.monitor, evaluation, remark
    )
    if slices and evaluation is not None:
        evaluation.slices(slices)
        made.slices_by = tuple(slices)
    if evaluation is not None and data is not None:
        Pictures(task, data, evaluation).fill(made)
    return made


class Pictures:
    """Chooses samples and draws them.

    Args:
        task: that predicts.
        data: of the samples.
        evaluation: of them.
    """

    def __init__(self, task: Task, data: ImageDataModule, evaluation: Evaluation) -> None:
        self.task, self.data, self.evaluation = task, data, evaluation
        self.album, self.heat_maps = Album(), ""
        self.rows = {id(one): row for row, one in enumerate(evaluation.samples)}

    def fill(self, report: Report) -> None:
        """Give a report its cards."""
        found = self.evaluation
        worst = found.mistakes(_WORST)
        shown = {id(one) for one in worst}
        uncertain = [one for one in found.uncertain(2 * _WORST) if id(one) not in shown][:_WORST]
        details = [f"error {one.judgement.error:.3f}" for one in worst]
        details += [f"certainty {one.judgement.certainty:.3f}" for one in uncertain]
        cards = self._looked_at([*worst, *uncertain], details)
        report.heat_maps = self.heat_maps
        report.worst, report.uncertain = cards[: len(worst)], cards[len(worst) :]
        self._fill_rest(report)

    def fill_of_several(self, report: Report, several: SeveralRuns) -> None:
        """Give the report of several runs its cards: the samples that most runs have wrong, or that they dispute."""
        report.worst, report.uncertain = (self._tallied(own) for own in (several.worst(_CELL), several.disputed(_CELL)))
        self._fill_rest(report)

    def _fill_rest(self, report: Report) -> None:
        report.cells = self._cells()
        report.objects = self._objects()
        report.findings = self._findings()
        if self.album.left_out:
            report.remark = f"{self.album.left_out} pictures were left out, so that the page stays small."

    # ---- samples that are looked at one by one

    def _looked_at(self, samples: Sequence[Judged], details: Sequence[str]) -> list[Card]:
        """What the model gets to see with its target, and beside it the heat map or the drawn prediction."""
        if not samples:
            return []
        try:
            drawn = self.data.drawn_samples(self.evaluation.part, [self.rows[id(one)] for one in samples])
            beside = self._beside(samples, drawn.pictures)
        except FlashtaskError:
            return []
        cards = []
        whole = zip(samples, drawn.pictures, beside, drawn.lines, details, strict=True)
        for one, picture, other, lines, detail in whole:
            pictures = [self.album.add(picture_address(each, _SIDE)) for each in (picture, other) if each is not None]
            target = one.target or "; ".join(lines[1:])
            title = " → ".join(filter(None, (target, one.said)))
            cards.append(Card(tuple(pictures), title, shown_name(one.name), detail))
        return cards

    def _beside(self, samples: Sequence[Judged], pictures: Sequence[Image.Image]) -> Sequence[Image.Image | None]:
        inputs = [self.data.images.input(one.input) for one in samples]
        if self.data.has_spatial_targets:
            return [
                said.draw(given.thumbnail(2 * _SIDE)) if _is_drawn_to_scale(said) else said.draw(_whole(given))
                for said, given in zip(self.task.predict(inputs), inputs, strict=True)
            ]
        found = heat_maps(self.task, inputs)
        if found is None:
            return [None] * len(samples)
        self.heat_maps = HEAT_MAPS[found.method]
        return [heated(picture, heat) for picture, heat in zip(pictures, found.maps, strict=True)]

    def _tallied(self, tallies: Sequence[Tally]) -> list[Card]:
        """Samples with how many of the runs have them wrong."""
        addresses = in_threads(lambda one: self._small_picture(one.judged, None), tallies)
        cards = []
        for one, address in zip(tallies, addresses, strict=True):
            wrong = f"wrong in {one.wrong} of {one.runs} runs; " if one.judged.judgement.pairs else ""
            title = " → ".join(filter(None, (one.judged.target, one.judged.said)))
            detail = f"{wrong}mean error {one.error:.3f}"
            cards.append(Card((self.album.add(address),), title, shown_name(one.judged.name), detail))
        return cards

    # ---- cells and objects

    def _cells(self) -> dict[tuple[str, str], list[Card]]:
        """Pictures of the cells of the confusion matrix: the wrong ones first, then the right ones."""
        found = self.evaluation
        counts: Counter[tuple[str, str]] = Counter()
        for one in found.samples:
            for pair in one.judgement.pairs:
                counts[pair.truth, pair.predicted] += pair.weight  # type: ignore[assignment]
        ordered = sorted(counts, key=lambda key: (key[0] == key[1], -counts[key]))
        chosen: dict[tuple[str, str], list[tuple[Judged, Pair]]] = {}
        left = _CELLS
        for key in ordered:
            of_cell = {(one.input, pair.box): (one, pair) for one, pair in reversed(found.cell(*key))}
            own = [*reversed(of_cell.values())][: min(_CELL, left)]  # each picture once, also of several runs
            left -= len(own)
            if own:
                chosen[key] = own
        flat = [one for own in chosen.values() for one in own]
        cards = iter(self._small(flat))
        return {key: [next(cards) for _ in own] for key, own in chosen.items()}

    def _objects(self) -> dict[str, tuple[int, list[Card]]]:
        """Errors about objects, as crops."""
        of_kind: dict[str, list[tuple[Judged, Pair]]] = {}
        for one in self.evaluation.samples:
            for pair in one.judgement.pairs:
                if pair.kind:
                    of_kind.setdefault(pair.kind, []).append((one, pair))
        found = {}
        for kind in (kind for kind in _KINDS if kind in of_kind):
            ordered = sorted(of_kind[kind], key=lambda two: -(0 if math.isnan(two[1].score) else two[1].score))
            found[kind] = (len(ordered), self._small(ordered[:_KIND]))
        return found

    def _small(self, chosen: Sequence[tuple[Judged, Pair]]) -> list[Card]:
        """Small pictures, of objects their surroundings."""
        addresses = in_threads(lambda two: self._small_picture(*two), chosen)
        cards = []
        for (one, pair), address in zip(chosen, addresses, strict=True):
            score = "" if math.isnan(pair.score) else f"{pair.score:.2f}"
            if pair.box is not None:
                # The object of another class that lies there has been found by another box.
                truth = pair.truth or ("another class" if pair.kind == "class" else "nothing")
                score = f"{truth} → {pair.predicted or 'nothing'} {score}"
            elif self.evaluation.scoring.unit == "pixels":
                score = f"{pair.weight:,.0f} pixels"
            cards.append(Card((self.album.add(address),), score.strip(), shown_name(one.name)))
        return cards

    def _small_picture(self, one: Judged, pair: Pair | None) -> str:
        given = self.data.images.input(one.input)
        try:
            if pair is None or pair.box is None:
                return picture_address(given.thumbnail(_SMALL), _SMALL)
            return picture_address(_crop(_whole(given), pair.box), _SMALL)
        except FlashtaskError:
            return ""

    # ---- the data

    def _findings(self) -> list[tuple[str, int, str, list[Card]]]:
        """What an audit without a model finds, and labels of validation that the model contradicts."""
        audit = self.data.audit()
        of_kind = {kind: [*found] for kind, found in audit.by_kind.items()}
        if contradicted := self._label_errors():
            of_kind["label"] = contradicted
        made = []
        for kind in (kind for kind in KINDS if kind in of_kind):
            about, found = KINDS[kind], of_kind[kind]
            cards = [self._finding(one) for one in found[:_KIND]]
            made.append((about.title, len(found), about.advice, cards))
        return made

    def _finding(self, one: Finding) -> Card:
        pictures = []
        for sample in one.samples[:2]:
            try:
                address = picture_address(self.data.images.input(sample.path).thumbnail(_SMALL), _SMALL)
            except FlashtaskError:
                continue
            pictures.append(self.album.add(address))
        names = " = ".join(sample.shown for sample in one.samples[:2]) or shown_name(one.subject)
        return Card(tuple(pictures), one.detail, names)

    def _label_errors(self) -> list[Finding]:
        """Labels that the model, which was not trained on these samples, contradicts."""
        found = self.evaluation
        if not found.scoring.classes_exclude or not found.samples:
            return []
        of_input: dict[str, list[Judged]] = {}
        for one in found.samples:
            if len(one.judgement.scores) == len(found.labels):
                of_input.setdefault(one.input, []).append(one)
        rows = [own[0] for own in of_input.values()]
        whole = [
            [[one.judgement.scores[label][0][0] for label in found.labels] for one in own] for own in of_input.values()
        ]
        scores = np.array([np.mean(own, axis=0) for own in whole])  # of several runs the mean
        targets = np.array([found.labels.index(one.judgement.pairs[0].truth) for one in rows])
        samples = [Sample(found.part, one.name, one.input, one.target) for one in rows]
        return [*label_errors(samples, targets, scores, found.labels)] if rows else []


def _scores(one: Judged, labels: Sequence[str]) -> list[float]:
    return [one.judgement.scores[label][0][0] for label in labels]


def _whole(given: Any) -> Image.Image:
    """The upright picture in its own size, mode RGB."""
    return given.thumbnail(max(given.size()))  # type: ignore[no-any-return]


def _is_drawn_to_scale(prediction: Any) -> bool:
    """Whether a prediction can be drawn into a smaller copy of its file."""
    return not hasattr(prediction, "boxes")


def _crop(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """An object with what is around it, and its box."""
    from flashtask.data.box_drawing import draw_boxes

    left, top, right, bottom = box
    more = _AROUND * max(right - left, bottom - top, 8)
    edges = (
        max(0, left - more),
        max(0, top - more),
        min(picture.width, right + more),
        min(picture.height, bottom + more),
    )
    x, y = round(edges[0]), round(edges[1])
    part = picture.crop((x, y, max(x + 1, round(edges[2])), max(y + 1, round(edges[3]))))
    if (factor := _SMALL / max(part.size)) > 1:
        part = part.resize([max(1, round(side * factor)) for side in part.size], Image.Resampling.BICUBIC)
    else:
        factor = 1.0
    return draw_boxes(
        part, [[(left - x) * factor, (top - y) * factor, (right - x) * factor, (bottom - y) * factor]], [""], [0]
    )


# ---- facts


def facts_of_run(run: FinishedRun, data: object) -> dict[str, str]:
    """What was trained, on what, how long and where: names with values.

    Args:
        run: finished.
        data: of it; None if there is none.
    """
    summary, recipe, task = run.summary, run.recipe, run.task
    model, counts = recipe.get("model", {}), data.sizes() if hasattr(data, "sizes") else {}
    versions = ", ".join(f"{name} {one}" for name, one in (summary.get("versions") or {}).items())
    seconds, speed = summary.get("seconds"), summary.get(f"{task.sample_noun}_per_second")
    where = [summary.get("device"), f"precision {summary['precision']}" if "precision" in summary else None]
    if threads := run.environment.get("threads"):
        where.append("1 thread" if threads == 1 else f"{threads} threads")
    epochs = f"{summary['epochs']} epochs, {summary['steps']:,} steps" if "epochs" in summary else ""
    best = f"; the model has epoch {run.metrics['epoch']:.0f}" if "epoch" in run.metrics else ""
    stopped = f"; stopped: {summary['stopped']}" if summary.get("stopped") else ""
    found = {
        "Task": summary.get("task") or task.name,
        "Backbone": summary.get("backbone") or model.get("backbone"),
        "Head": model.get("head"),
        "Strategy": summary.get("strategy"),
        "Phases": _phases(run.history, summary.get("parameters")),
        "Data": ", ".join(f"{count:,} {part}" for part, count in counts.items()),
        "Targets": data.describe_targets() if hasattr(data, "describe_targets") else "",
        "Training": f"{epochs}{best}{stopped}",
        "Time": f"{duration(seconds)}{f', {speed:,.0f} {task.sample_noun} a second in training' if speed else ''}"
        if seconds is not None
        else "",
        "Where": ", ".join(str(one) for one in where if one),
        "Seed": "" if summary.get("seed") is None else str(summary["seed"]),
        "Versions": versions,
        "Folder": str(run.folder.absolute()) if run.is_folder else str(run.path.absolute()),
    }
    return {name: str(value) for name, value in found.items() if value}


def _phases(history: History, parameters: int | None) -> str:
    phases = phases_of(history)
    whole = f" of {parameters:,}" if parameters else ""
    words = [
        f"epochs {history[first]['epoch']:.0f} to {history[last - 1]['epoch']:.0f}: {count:,}{whole} parameters train"
        for first, last, count in phases
    ]
    return "; ".join(words[:6] + ([f"and {len(words) - 6} more"] if len(words) > 6 else []))


def duration(seconds: float) -> str:
    """Seconds as people say them: `1 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _command(run: FinishedRun) -> str:
    """The command that repeats a run; empty if its recipe cannot."""
    if not run.is_folder or not (run.folder / "recipe.yaml").exists():
        return ""
    lost: Mapping[str, str] = run.recipe.get("not_saved") or {}
    if lost:
        return ""
    return f"flashtask finetune {shlex.quote(os.path.join(run.folder.absolute(), 'recipe.yaml'))}"
