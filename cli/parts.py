"""The parts of a run that a recipe names: data, model, trainer; and the numbers that are to be found first."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashtask.cli.kinds import AUTO
from flashtask.cli.model_source import build_model
from flashtask.cli.options import CONSTRUCTOR
from flashtask.cli.own_zoo import use_recipe_zoo
from flashtask.cli.recipe import Recipe
from flashtask.cli.recipe_checks import check_sections
from flashtask.cli.request import fill_in

__all__ = ["SEARCHED", "Parts", "build_data", "build_parts"]

#: argument of `tune` -> the recipe key whose value may be `auto`
SEARCHED = {"batch_size": f"data.{CONSTRUCTOR}.batch_size", "learning_rate": "model.learning_rate"}


@dataclass(frozen=True)
class Parts:
    """What a recipe stands for.

    Args:
        trainer: not yet used.
        model: not yet trained.
        datamodule: its data.
        finetune: arguments of `Trainer.finetune`.
        searched: what the recipe says `auto` for, as arguments of `tune`.
    """

    trainer: Any
    model: Any
    datamodule: Any
    finetune: dict[str, Any]
    searched: dict[str, bool]

    def tune(self, **options: Any) -> Any:
        """Find what is searched for, and give it to the model and its data.

        Args:
            options: instead of True, for an argument of `tune`.
        """
        from flashtask.trainer.finetuning.strategies import resolve_finetuning
        from flashtask.trainer.tuning.tune import tune

        finetuning = resolve_finetuning(self.finetune.get("strategy") or self.model.default_strategy)
        return tune(self.trainer, self.model, self.datamodule, finetuning=finetuning, **{**self.searched, **options})


def build_parts(recipe: Recipe, strategy: Any = None) -> Parts:
    """Build the parts, with defaults in place of what is to be found.

    Args:
        recipe: of the run.
        strategy: that joins its processes already, in place of the one that the recipe names.

    Raises:
        UsageError: a key that nothing takes, or a value that cannot be meant.
    """
    from flashtask.core.seeding import seed_everything
    from flashtask.trainer.trainer import Trainer

    task_class = _checked_task(recipe)
    searched = _take_out_searched(recipe)
    # Before the model: the weights of what is not pretrained are drawn when it is built.
    seed_everything(recipe.get("trainer.seed") or 0, verbose=False)
    datamodule = _data_of(recipe, task_class)
    _allow_several_labels(recipe, task_class, datamodule)
    model = build_model(task_class, recipe.get("model", {}))
    if model.chosen_backbone:
        recipe.set("model.backbone", model.chosen_backbone, "the default")
    model.licences = recipe.get("licences") or {}
    _merge_other_factors(model, recipe.get("finetune.strategy") or model.default_strategy)
    joined = {} if strategy is None else {"strategy": strategy}
    trainer = Trainer(**{**recipe.get("trainer", {}), **joined})
    return Parts(trainer, model, datamodule, recipe.get("finetune") or {}, searched)


def build_data(recipe: Recipe) -> Any:
    """The data of a recipe alone.

    Raises:
        UsageError: as `build_parts`.
    """
    task_class = _checked_task(recipe)
    _take_out_searched(recipe)
    return _data_of(recipe, task_class)


def _checked_task(recipe: Recipe) -> Any:
    from flashtask.tasks import TASKS

    use_recipe_zoo(recipe)
    fill_in(recipe)
    task_class: Any = TASKS.get(recipe.get("task"))
    check_sections(recipe, task_class)
    return task_class


def _data_of(recipe: Recipe, task_class: Any) -> Any:
    return getattr(task_class.data_class, recipe.constructor)(**recipe.get(f"data.{recipe.constructor}"))


def _allow_several_labels(recipe: Recipe, task_class: Any, datamodule: Any) -> None:
    """Data with several labels per image leaves no other reading of a task that may have one or several."""
    targets = getattr(datamodule, "targets", None)
    has_several = isinstance(targets, Mapping) and targets.get("kind") == "labels"
    is_open = recipe.get("model.multi_label") is None and recipe.get("model.from") is None
    if has_several and is_open and "multi_label" in task_class.argument_names():
        recipe.set("model.multi_label", True, "DATA")


def _merge_other_factors(model: Any, strategy: Any) -> None:
    """What a run begins from may have LoRA factors; those that this run would not train become part of the weights."""
    from flashtask.trainer.finetuning.lora import adapted_layers, merge
    from flashtask.trainer.finetuning.strategies import resolve_finetuning

    settings = {layer.lora_settings for layer in adapted_layers(model).values()}
    if settings and settings != {resolve_finetuning(strategy).lora}:
        print(f"merged the LoRA factors of {merge(model)} layers into their weights", file=sys.stderr)


def _take_out_searched(recipe: Recipe) -> dict[str, bool]:
    """Take what says `auto` out of the recipe."""
    searched = {name: recipe.here(key) for name, key in SEARCHED.items() if recipe.get(recipe.here(key)) == AUTO}
    for key in searched.values():
        recipe.remove(key)
    return dict.fromkeys(searched, True)
