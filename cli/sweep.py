"""`flashtask sweep`: trainings of a recipe that leaves some values open, each where the ones before point to.

Optuna proposes values; each trial is a run folder of its own, made as `finetune` makes it. The study is a SQLite file
beside them, or a database, so several processes may work on it. A sweep that was stopped goes on: a trial that lost its
process is continued from its last checkpoint.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from flashtask.cli.options import FINETUNE, unset
from flashtask.cli.output import require_creatable
from flashtask.cli.recipe import Recipe, asked_for_several, read_recipe
from flashtask.cli.request import fill_in, requested_recipe
from flashtask.cli.search_space import Dimension, search_space
from flashtask.cli.trained_run import trained_run
from flashtask.core.errors import DivergedError, FlashtaskError, OutOfMemoryError, UsageError
from flashtask.core.files import atomic_write, missing_file
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.callbacks.timing import read_duration
from flashtask.trainer.metric_order import best_mode
from flashtask.trainer.text_table import text_table

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["sweep"]

_TRIALS = 20
_SHOWN = 10
_PRUNED = "the sweep ended it: worse than the median of the trials before"


def sweep(path: str, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        path: a recipe that leaves values open.
        params: the options of the command.

    Raises:
        MissingInputError: there is no such recipe.
        UsageError: it leaves nothing open, or Optuna is not installed.
        OutputError: the folder cannot be written.
    """
    source = Path(path)
    if not source.is_file():
        raise missing_file(source)
    recipe = read_recipe(source)
    if several := asked_for_several(recipe):
        raise UsageError(
            f"{recipe.source_of(several)}: a trial of a sweep is one run, so `{several}` cannot be in its recipe",
            fix=f"sweep without it, then flashtask finetune best.yaml --{several} 5",
        )
    space = search_space(recipe)
    folder = Path(params["output_dir"] or f"sweeps/{source.stem}")
    require_creatable(folder)
    try:
        import optuna
    except ImportError as error:
        raise UsageError("a sweep needs Optuna", fix="pip install 'flashtask[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    one = _Sweep(folder, recipe, space, params)
    with redirect_stdout(sys.stderr):
        one.go_on()
    one.write()
    click.echo(json.dumps(one.summary()) if params["json"] else "\n".join(one.lines()))


class _Sweep:
    """One study and its folder.

    Args:
        folder: for the study, and a run folder for each trial.
        recipe: that the trials share.
        space: what differs between them.
        params: the options of the command.
    """

    def __init__(self, folder: Path, recipe: Recipe, space: Sequence[Dimension], params: Mapping[str, Any]) -> None:
        import optuna

        self.folder, self.recipe, self.space = folder, recipe, space
        self.most = params["trials"] or _TRIALS
        self.end = time.monotonic() + read_duration(params["time"]).total_seconds() if params["time"] else float("inf")
        self.monitor, mode = _monitor_of(recipe, space)
        pruner = optuna.pruners.NopPruner() if params["no_pruning"] else optuna.pruners.MedianPruner(5, 1)
        self.study: Study = optuna.create_study(
            study_name="flashtask",
            storage=params["storage"] or f"sqlite:///{(folder / 'study.db').absolute()}",
            sampler=optuna.samplers.TPESampler(seed=params["seed"]),
            pruner=pruner,
            direction="maximize" if mode == "max" else "minimize",
            load_if_exists=True,
        )

    # ---- trials

    def go_on(self) -> None:
        """Take over the trials that lost their process, then begin new ones, until there are enough or time is over."""
        from optuna.trial import TrialState

        for number in [trial.number for trial in self.study.get_trials(states=(TrialState.RUNNING,))]:
            with self._locked(number) as is_ours:
                left = next(one for one in self.study.get_trials() if one.number == number)
                if not is_ours or left.state != TrialState.RUNNING:
                    continue  # its process is there, or another one has taken it over
                if len(left.params) < len(self.space):
                    # Its process ended before it had all its values: there is nothing to go on with.
                    self.study.tell(number, state=TrialState.FAIL)
                    continue
                print(f"trial {number} goes on", file=sys.stderr)
                self._run(number, self._values_of(left.params), None)
        while time.monotonic() < self.end and len(self.study.get_trials(deepcopy=False)) < self.most:
            trial = self.study.ask()
            with self._locked(trial.number):
                self._run(trial.number, {one.key: one.suggest(trial) for one in self.space}, trial)

    @contextmanager
    def _locked(self, number: int) -> Iterator[bool]:
        """Hold the lock of a trial; False if another process holds it. It is freed with its process."""
        import fcntl

        place = self.folder / "locks"
        place.mkdir(exist_ok=True)
        with (place / f"{number:03}").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _run(self, number: int, values: Mapping[str, Any], trial: Trial | None) -> None:
        """Train one trial, from its last checkpoint if there is one, and tell the study what came of it."""
        from optuna.trial import TrialState

        started = time.monotonic()
        try:
            value, is_pruned = self._trained(number, values, trial)
        except (DivergedError, OutOfMemoryError) as error:
            print(f"trial {number} failed: {error.what}", file=sys.stderr)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            return
        except FlashtaskError:
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            raise
        state = TrialState.PRUNED if is_pruned else TrialState.COMPLETE
        self.study.tell(number, None if is_pruned else value, state, skip_if_finished=True)
        shown = ", ".join(f"{key.rpartition('.')[2]} {_short(one)}" for key, one in values.items())
        seconds = time.monotonic() - started
        print(f"trial {number}: {self.monitor} {value:.4f} in {seconds:.1f} s; {shown}", file=sys.stderr)

    def _trained(self, number: int, values: Mapping[str, Any], trial: Trial | None) -> tuple[float, bool]:
        place = self.run_folder(number)
        recipe = self._recipe_with(values)
        recipe.set("trainer.output_dir", str(place.absolute()), "sweep")
        watching = [] if trial is None else [_Reporter(trial, self.monitor)]
        summary = trained_run(_checked(recipe, self.folder / "recipes" / f"{number:03}.yaml"), watching)
        if self.monitor not in summary["best"]:
            raise UsageError(
                f"the runs measure no {self.monitor}: the recipe has no validation data",
                fix=f"data: {{{self.recipe.constructor}: {{..., val_split: 0.2}}}} in the recipe",
            )
        return float(summary["best"][self.monitor]), summary["stopped"] == _PRUNED

    def run_folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / "trials" / f"{number:03}"

    def _values_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {one.key: one.value_of(params[one.key]) for one in self.space}

    def _recipe_with(self, values: Mapping[str, Any]) -> Recipe:
        made = Recipe(copy.deepcopy(self.recipe.values), dict(self.recipe.sources))
        for key, value in values.items():
            made.set(key, value, "sweep")
        made.set("trainer.enable_progress_bar", False, "sweep")
        made.set("trainer.report", False, "sweep")
        return made

    # ---- what came of them

    def finished(self) -> list[FrozenTrial]:
        """The trials that were trained to their end, the best first."""
        from optuna.study import StudyDirection
        from optuna.trial import TrialState

        found = self.study.get_trials(states=(TrialState.COMPLETE,))
        return sorted(
            found, key=lambda trial: trial.value or 0.0, reverse=self.study.direction == StudyDirection.MAXIMIZE
        )

    def importances(self) -> dict[str, float]:
        """The share of each key in what is better than most trials; empty if there are too few."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if len(self.finished()) < 4:
            return {}
        try:
            return dict(get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator()))
        except (RuntimeError, ValueError):
            return {}

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [self._row(trial) for trial in self.study.get_trials(deepcopy=False)]
        best = self.finished()[:1]
        return {
            "monitor": self.monitor,
            "best": self._row(best[0]) if best else None,
            "importances": self.importances(),
            "trials": rows,
        }

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        known = {one.key: one.value_of(trial.params[one.key]) for one in self.space if one.key in trial.params}
        seconds = trial.duration.total_seconds() if trial.duration else None
        state = trial.state.name.lower()
        return {"trial": trial.number, "state": state, "value": trial.value, "seconds": seconds, **known}

    def write(self) -> None:
        """Write `trials.csv`, and `best.yaml`: the recipe of the best trial with nothing left open."""
        rows = [self._row(trial) for trial in self.study.get_trials(deepcopy=False)]
        text = io.StringIO()
        table = csv.DictWriter(text, ["trial", "state", "value", "seconds", *(one.key for one in self.space)])
        table.writeheader()
        table.writerows(rows)
        with atomic_write(self.folder / "trials.csv") as file:
            file.write(text.getvalue().encode())
        if best := self.finished()[:1]:
            own = read_recipe(self.run_folder(best[0].number) / "recipe.yaml")
            for key in ("trainer.enable_progress_bar", "trainer.report", "trainer.output_dir"):
                own.remove(key)
            with atomic_write(self.folder / "best.yaml") as file:
                file.write(yaml.safe_dump(own.values, sort_keys=False, allow_unicode=True).encode())

    def lines(self) -> Iterator[str]:
        """The best trials, the importances, and what to do next."""
        best = self.finished()
        trials = self.study.get_trials(deepcopy=False)
        states = {trial.state.name.lower() for trial in trials}
        counts = [f"{sum(trial.state.name.lower() == state for trial in trials)} {state}" for state in sorted(states)]
        yield f"{len(trials)} trials: {', '.join(counts)}"
        if not best:
            return
        keys = [one.key.rpartition(".")[2] for one in self.space]
        rows = [
            [f"{trial.number:03}", f"{trial.value:.4f}", *map(_short, self._values_of(trial.params).values())]
            for trial in best[:_SHOWN]
        ]
        yield text_table(["trial", self.monitor, *keys], rows).rstrip()
        if found := self.importances():
            shares = ", ".join(f"{key.rpartition('.')[2]} {share:.0%}" for key, share in found.items())
            yield f"importance: {shares}"
        yield f"best run: {self.run_folder(best[0].number)}"
        yield f"next: flashtask finetune {self.folder / 'best.yaml'}"


class _Reporter(Callback):
    """Reports the metric of each epoch to Optuna, and ends a run that Optuna gives up."""

    in_recipe = False

    def __init__(self, trial: Trial, monitor: str) -> None:
        self._trial, self._monitor = trial, monitor

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        value = trainer.callback_metrics.get(self._monitor)
        if value is None:
            return
        self._trial.report(float(value), trainer.current_epoch)
        run = trainer.current_fit
        if run is not None and self._trial.should_prune():
            run.stop(_PRUNED)


def _monitor_of(recipe: Recipe, space: Sequence[Dimension]) -> tuple[str, str]:
    """The metric of the recipe's model, and whether more (`max`) or less (`min`) is better."""
    from flashtask.cli.model_source import build_model
    from flashtask.tasks import TASKS

    made = Recipe(copy.deepcopy(recipe.values), dict(recipe.sources))
    for one in space:
        made.set(one.key, one.values[0], "sweep")
    fill_in(made)
    model = build_model(TASKS.get(made.get("task")), made.get("model", {}))
    return model.monitor, best_mode("sweep", model.monitor, None, model)


def _checked(recipe: Recipe, file: Path) -> Recipe:
    """The recipe of a trial after the checks of `finetune`; it is written first, as what the checks name."""
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file) as stream:
        stream.write(yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True).encode())
    return requested_recipe(None, {**unset(FINETUNE), "config": str(file)})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
