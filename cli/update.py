"""`flashtask update`: train a model further on new data, and replace the old one only if it has not forgotten."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.options import FINETUNE, unset
from flashtask.cli.output import require_creatable, require_free, require_writable_file
from flashtask.cli.parts import build_data
from flashtask.cli.recipe import Recipe, read_recipe
from flashtask.cli.request import requested_recipe, require_data
from flashtask.cli.trained_run import trained_run
from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.core.files import atomic_write, atomic_write_text
from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_WEIGHTS

if TYPE_CHECKING:
    from flashtask.reports.forgetting import Forgetting
    from flashtask.tasks.finished_run import FinishedRun

__all__ = ["ForgottenError", "update"]

_ALLOWED = 2.0
_TABLE = "samples.csv"
#: Keys of the old run that are about its own length, place and data.
_NOT_TAKEN = ("max_steps", "output_dir", "default_root_dir", "enable_progress_bar")
#: Options that are passed on to `finetune`.
_PASSED = ("--epochs", "--lr", "--strategy", "--quiet", "--no-report")
#: Path, label and part.
Row = tuple[str, str, str]


class ForgottenError(FlashtaskError):
    """A model that was trained further gets an old class right less often than is allowed."""

    exit_code = 76


def update(source: str, data: str, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        source: a run folder, or a checkpoint in one.
        data: the new data, as for `finetune`.
        params: the options of the command.

    Raises:
        UsageError: a run whose data cannot be had, or that does not predict one label an image.
        OutputError: a folder or file cannot be written.
        ForgottenError: an old class fell by more than is allowed; nothing was replaced.
    """
    checkpoint = Path(checkpoint_source(source))
    recipe_file = checkpoint.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise UsageError(f"{source} does not lead to the data that it was trained on", fix="flashtask update RUN DATA")
    output, install = Path(params["output_dir"] or f"{checkpoint.parent}-updated"), params["install"]
    require_free(output)
    require_creatable(output)
    if install:
        require_writable_file(Path(install))
    new = requested_recipe(data, {**unset(FINETUNE), "val_split": params["val_split"]})
    require_data(new)
    with redirect_stdout(sys.stderr):
        found = _updated(checkpoint, read_recipe(recipe_file), new, output, params)
    if found.fallen:
        named = ", ".join(f"{one.label} by {-one.points:.1f}" for one in found.fallen)
        print("\n".join(found.lines()), file=sys.stderr)
        if params["json"]:
            click.echo(json.dumps(found.to_dict()))
        raise ForgottenError(
            f"{len(found.fallen)} old class{'es' if len(found.fallen) > 1 else ''} fell by more than "
            f"{found.allowed:g} points: {named}; nothing was replaced",
            why=f"the model in {output} was trained on the new data and gets old images wrong that it got right",
            fix="replay more old images (without --replay: all), a lower --lr, or allow more points: --allow 5",
        )
    if install:
        _install(output / "best.ckpt", Path(install))
    if params["json"]:
        click.echo(json.dumps(found.to_dict()))
        return
    click.echo("\n".join(found.lines()))
    click.echo(f"run folder: {output}")
    if install:
        click.echo(f"installed: {install}")


def _updated(checkpoint: Path, old: Recipe, new: Recipe, output: Path, params: Mapping[str, Any]) -> Forgetting:
    from flashtask import load
    from flashtask.reports.forgetting import forgetting
    from flashtask.tasks.finished_run import FinishedRun

    before = FinishedRun(checkpoint.parent, task=load(checkpoint).eval())
    _require_labels(before)
    # Judged first: that reads all old validation images, and names those that are missing.
    judged = before.evaluation("val")
    rows = [*_rows(before.data, params["replay"]), *_new_rows(old, new)]
    trains = {path for path, _, part in rows if part == "train"}
    was_validated = {one.input for one in judged.samples}
    if both := trains & was_validated:
        raise UsageError(
            f"{len(both)} old validation images are training images of DATA, such as {sorted(both)[0]}",
            why="they would no longer show what the model has forgotten",
            fix="remove them from the training images of DATA",
        )
    output.mkdir(parents=True, exist_ok=True)
    _write_table(output / _TABLE, rows)
    recipe = _recipe(old, checkpoint, output, params)
    trained_run(recipe)
    after = FinishedRun(output).evaluation("val").samples
    mine = [one for one in after if one.input in was_validated]
    return forgetting(
        judged.samples,
        mine,
        [one for one in after if one.input not in was_validated],
        _ALLOWED if params["allow"] is None else params["allow"],
    )


def _require_labels(run: FinishedRun) -> None:
    if run.task.name != "image_classification" or run.data.targets.get("kind") != "label":
        raise UsageError(f"update is for one label an image, not for {run.task.name}", fix="flashtask finetune --from")
    if "val" not in run.data.sizes():
        raise UsageError(
            f"{run.folder} has no validation data, on which forgetting could be measured",
            fix=f"flashtask finetune DATA --from {run.folder}",
        )


def _rows(data: Any, replayed: int | None) -> Iterator[Row]:
    """Path, label and part of training and validation samples.

    Args:
        data: of a run, or new.
        replayed: how many training samples, with the share of each class kept; None for all.
    """
    from flashtask.data.splits import stratified_split

    for part in ("train", "val"):
        if part not in data.sizes():
            continue
        table, labels = data.samples(part), data.target_words(part)
        paths: Sequence[str] = table.inputs.tolist()
        if lost := [path for path in paths if not os.path.isfile(path)]:
            raise UsageError(f"{lost[0]!r} is not a file, so it cannot be trained on again", fix="data in files")
        places: Sequence[int] = range(len(paths))
        if part == "train" and replayed is not None and replayed < len(paths):
            _, places = stratified_split(table.names(), labels, replayed)
        for place in places:
            yield os.path.abspath(paths[place]), labels[place], part


def _new_rows(old: Recipe, new: Recipe) -> Iterator[Row]:
    """The same of the new data."""
    new.set("task", old.get("task"), "MODEL")
    made = build_data(new)
    made.setup("fit")
    yield from _rows(made, None)


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "label", "part"))
    table.writerows(rows)
    atomic_write_text(path, text.getvalue())


def _recipe(old: Recipe, checkpoint: Path, output: Path, params: Mapping[str, Any]) -> Recipe:
    """The recipe of the old run, on old and new samples, from its weights."""
    (arguments,) = old.get("data").values()
    kept = ("batch_size", "num_workers", "augment", "flip", "random_erasing", "value_range", "on_bad_image")
    columns = {"input_field": "path", "target_fields": "label", "split_field": "part"}
    of_data = {name: arguments[name] for name in kept if arguments.get(name) is not None}
    model = {
        name: value
        for name, value in (old.get("model") or {}).items()
        if name not in (*OF_THE_WEIGHTS, *OF_THE_HEAD, "from", "from_sha256")
    }
    trainer = {name: value for name, value in (old.get("trainer") or {}).items() if name not in _NOT_TAKEN}
    values = {
        "task": old.get("task"),
        "data": {"from_csv": {"train_file": str((output / _TABLE).absolute()), **columns, **of_data}},
        "model": {**model, "from": str(checkpoint.absolute())},
        "trainer": trainer,
        "finetune": dict(old.get("finetune") or {}),
    }
    file = output / "update.yaml"
    atomic_write_text(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    said = {option.name: params[option.name] for option in FINETUNE if option.name in params and option.flag in _PASSED}
    recipe = requested_recipe(None, {**unset(FINETUNE), **said, "config": str(file)})
    recipe.set("trainer.output_dir", str(output.absolute()), "--output-dir")
    return recipe


def _install(model: Path, place: Path) -> None:
    """Put a file in the place of another by one rename."""
    with model.open("rb") as source, atomic_write(place, size=model.stat().st_size) as target:
        shutil.copyfileobj(source, target)
