"""`flashtask plan`: what a run would do, printed and not done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from flashtask.cli.kinds import AUTO
from flashtask.cli.parts import SEARCHED, build_parts
from flashtask.cli.processes import launched, refuse_search
from flashtask.cli.request import requested_recipe, require_data
from flashtask.cli.switches import SWITCHES
from flashtask.core.errors import UsageError
from flashtask.trainer.text_table import text_table, wrapped

if TYPE_CHECKING:
    from flashtask.cli.recipe import Recipe
    from flashtask.trainer.finetuning_plan import PhasePlan, Plan

__all__ = ["plan"]

#: Of more parameter groups than these in a phase, the first two and the last are listed.
_MOST_GROUPS = 3


def plan(data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        data: the folder or recipe that the user named, if any.
        params: the options of the command.

    Raises:
        UsageError: a number is to be searched for first.
    """
    recipe = requested_recipe(data, params)
    if searched := [key for key in map(recipe.here, SEARCHED.values()) if recipe.get(key) == AUTO]:
        raise UsageError(
            f"a plan needs a number for {', '.join(searched)}, not auto",
            why="plan does not search",
            fix="flashtask tune finds it; then --batch-size N, --lr X",
        )
    require_data(recipe)
    with launched(recipe.get("trainer", {})) as joined:
        parts = build_parts(recipe, joined)
        backbone = parts.model.choice_of_backbone
        strategy, said = parts.finetune.get("strategy"), ""
        if budget := parts.finetune.get("budget"):
            refuse_search(joined, "--budget", "the same with one process")
            chosen = parts.trainer.choose_within(budget, parts.model, datamodule=parts.datamodule, strategy=strategy)
            strategy, parts.trainer.max_epochs, said = chosen.strategy, chosen.epochs, chosen.says
        measure = not params["no_measure"]
        planned = parts.trainer.plan(parts.model, datamodule=parts.datamodule, strategy=strategy, measure=measure)
        processes = 1 if joined is None else joined.world_size
    switches = _switches(recipe, parts.model)
    if params["json"]:
        click.echo(json.dumps({**planned.to_dict(), "switches": switches, **({"budget": said} if said else {})}))
        return
    click.echo("\n".join([*wrapped(backbone), *wrapped(said), *_lines(planned, processes, switches)]))


def _switches(recipe: Recipe, model: Any) -> dict[str, Any]:
    """The switches that the recipe or the command sets, by name; the size of the images as it is used."""
    keys = {switch.key.rpartition(".")[2]: recipe.get(recipe.here(switch.key)) for switch in SWITCHES}
    found = {name: value for name, value in keys.items() if value is not None}
    if "image_size" in found:
        found["image_size"] = list(model.preprocessing.input_size[1:])
    return found


def _lines(planned: Plan, processes: int, switches: Mapping[str, Any]) -> Iterator[str]:
    yield from wrapped(f"strategy {planned.strategy}: {planned.parameters:,} parameters")
    if switches:
        yield from wrapped(", ".join(f"{name}={value}" for name, value in switches.items()))
    size = f" of {planned.batch_size} samples" if planned.batch_size is not None else ""
    where = f"{planned.device}, {planned.precision}" + (f", {processes} processes" if processes > 1 else "")
    yield f"{_or_open(planned.epochs)} epochs, {_or_open(planned.steps)} steps; {where}"
    validation = _or_open(planned.validation_batches)
    yield f"batches per epoch: {_or_open(planned.batches)}{size}, {validation} for validation"
    yield from wrapped(planned.remark)
    yield from wrapped(planned.features)
    yield ""
    shown = 7 if planned.how else 5
    heads = ("trains", "epochs", "trainable", "frozen", "steps", "memory", "time")[:shown]
    yield from text_table(heads, [_row(phase)[:shown] for phase in planned.phases]).splitlines()
    yield ""
    yield "learning rates: base, and at the first step of the phase"
    for phase in planned.phases:
        yield from _rates(phase)
    waiting = [phase for phase in planned.phases if phase.epochs is None]
    if waiting:
        yield ""
        yield from (line for phase in waiting for line in wrapped(f"phase {phase.number} ends: {phase.until}"))
    yield ""
    yield from _how(planned)


def _row(phase: PhasePlan) -> tuple[str, ...]:
    if phase.epochs == 0:
        epochs = "none"
    elif phase.start is None or phase.epochs is None:
        epochs = f"{'?' if phase.start is None else phase.start}-?"
    else:
        last = phase.start + phase.epochs - 1
        epochs = str(last) if last == phase.start else f"{phase.start}-{last}"
    memory = "" if phase.memory is None else _bytes(phase.memory)
    spent = "" if phase.seconds is None else _duration(phase.seconds)
    numbers = (f"{phase.trainable:,}", f"{phase.frozen:,}", _or_open(phase.steps), memory, spent)
    return (f"{phase.number} {phase.trains}", epochs, *numbers)


def _rates(phase: PhasePlan) -> Iterator[str]:
    groups = phase.groups if phase.epochs != 0 else ()
    hidden = len(groups) - _MOST_GROUPS if len(groups) > _MOST_GROUPS + 1 else 0
    for number, group in enumerate((*groups[:2], *groups[2 + hidden :])):
        start = f"  {phase.number}" if number == 0 else "   "
        if hidden and number == 2:
            yield f"    and {hidden} groups between these:"
        rate = "" if group.rate is None else f", {group.rate:.3g}"
        yield f"{start} {group.name}: {group.base_rate:.3g}{rate} ({group.parameters:,} parameters)"
    if not phase.groups:
        none = "none: no optimizer takes a step"
        yield f"  {phase.number} {'those of configure_optimizers' if phase.steps != 0 else none}"


def _how(planned: Plan) -> Iterator[str]:
    if not planned.how:
        yield "memory and time were not measured"
        return
    total = "not known" if planned.seconds is None else _duration(planned.seconds)
    yield f"estimated time of the run: {total}, not counting start-up and writing files"
    yield from wrapped(planned.how)


def _or_open(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f}GiB" if size >= 2**30 else f"{size / 2**20:.0f}MiB"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return "<0.1s" if seconds < 0.1 else f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
