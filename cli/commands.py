"""The commands as click sees them: arguments, options and help. What they do is imported when they run."""

from __future__ import annotations

from typing import Any

import click

from flashtask._version import __version__
from flashtask.cli.options import EVALUATE, EVERYWHERE, FINETUNE, PREDICT, TUNE, ZOO, add_options
from flashtask.cli.usage import Commands

__all__ = ["flashtask"]

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Commands, invoke_without_command=True, context_settings=_SETTINGS)
@click.version_option(__version__, message="flashtask %(version)s")
@add_options(EVERYWHERE)
@click.pass_context
def flashtask(context: click.Context, debug: bool) -> None:
    """Fine-tune image models, and use them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@flashtask.command(short_help="Fine-tune a pretrained network on a folder of images.")
@click.argument("data", required=False)
@add_options(FINETUNE + EVERYWHERE)
def finetune(data: str | None, **params: Any) -> None:
    """Fine-tune a pretrained network on DATA.

    DATA is a folder that holds train/ (and val/, test/) with one folder per class, a folder of class folders,
    or a recipe (a YAML file), such as the recipe.yaml of an earlier run.
    """
    from flashtask.cli.finetune import finetune as run_finetune

    run_finetune(data, params)


@flashtask.command(short_help="Find a batch size and a learning rate; train nothing.")
@click.argument("data", required=False)
@add_options(TUNE + EVERYWHERE)
def tune(data: str | None, **params: Any) -> None:
    """Find a batch size and a learning rate for DATA, as `finetune --batch-size auto --lr auto` does first.

    DATA is what it is for `finetune`. Nothing is written but the picture that is asked for.
    """
    from flashtask.cli.tune import tune as run_tune

    run_tune(data, params)


@flashtask.command(short_help="Predict the labels of images.")
@click.argument("ckpt")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE_OR_FOLDER...")
@add_options(PREDICT + EVERYWHERE)
def predict(ckpt: str, images: tuple[str, ...], **params: Any) -> None:
    """Predict the labels of images with a checkpoint, in the order they are given.

    A folder stands for all images in it and below it, sorted by path.
    """
    from flashtask.cli.predict import predict as run_predict

    run_predict(ckpt, images, params)


@flashtask.command(short_help="Measure a checkpoint on validation data.")
@click.argument("ckpt")
@click.argument("data")
@add_options(EVALUATE + EVERYWHERE)
def validate(ckpt: str, data: str, **params: Any) -> None:
    """Measure a checkpoint on DATA/val, or on DATA itself if there is no val/ in it."""
    from flashtask.cli.evaluate import evaluate

    evaluate("validate", ckpt, data, params)


@flashtask.command(short_help="Measure a checkpoint on test data.")
@click.argument("ckpt")
@click.argument("data")
@add_options(EVALUATE + EVERYWHERE)
def test(ckpt: str, data: str, **params: Any) -> None:
    """Measure a checkpoint on DATA/test, or on DATA itself if there is no test/ in it."""
    from flashtask.cli.evaluate import evaluate

    evaluate("test", ckpt, data, params)


@flashtask.command(short_help="List what there is to build with.")
@click.argument("words", nargs=-1, metavar="[QUERY] | show NAME")
@add_options(ZOO + EVERYWHERE)
def zoo(words: tuple[str, ...], **params: Any) -> None:
    """List backbones, heads, tasks and checkpoints, or show what is known of one.

    QUERY is a part of a name, or a kind in the plural (backbones, heads, tasks, checkpoints).
    """
    from flashtask.cli.zoo import list_zoo

    list_zoo(words, params)
