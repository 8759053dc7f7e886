"""The commands as click sees them: arguments, options and help. What they do is imported when they run."""

from __future__ import annotations

from typing import Any

import click

from flashtask._version import __version__
from flashtask.cli.options import (
    AUDIT,
    BENCH,
    CACHE,
    CHAOS,
    COMPARE,
    CONVERT,
    DOCTOR,
    EVALUATE,
    EVERYWHERE,
    EXPORT,
    FINETUNE,
    LEARNING_CURVE,
    LICENCE,
    OPERATE,
    PLAN,
    PREDICT,
    PULL,
    PUSH,
    REPORT,
    RERUN,
    RUNS,
    SERVE,
    SHARD,
    SHOW,
    SWEEP,
    TUNE,
    UPDATE,
    ZOO,
    add_options,
)
from flashtask.cli.usage import Commands

__all__ = ["flashtask"]

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


@click.group(cls=Commands, invoke_without_command=True, context_settings=_SETTINGS)
@click.version_option(__version__, message="flashtask %(version)s")
@add_options(EVERYWHERE)
@click.pass_context
def flashtask(context: click.Context, debug: bool) -> None:
    """Fine-tune image models and use them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@flashtask.command(short_help="Fine-tune a pretrained model on images.")
@click.argument("data", required=False)
@add_options(FINETUNE + EVERYWHERE)
def finetune(data: str | None, **params: Any) -> None:
    """Fine-tune a pretrained model on DATA.

    DATA is a folder with train/ (and val/, test/) that hold one folder per class, a folder of class folders, a table
    (.csv, .tsv, .jsonl or .parquet), an archive of these (.zip, .tar.gz), the address of one (https://), a dataset
    repository (hf://datasets/org/name), a folder that `shard` wrote, YOLO's data.yaml, or a recipe (.yaml), such as the
    recipe.yaml of an earlier run.
    """
    from flashtask.cli.finetune import finetune as run_finetune

    run_finetune(data, params)


@flashtask.command(short_help="Find a batch size and a learning rate.")
@click.argument("data", required=False)
@add_options(TUNE + EVERYWHERE)
def tune(data: str | None, **params: Any) -> None:
    """Find a batch size and a learning rate for DATA, as `finetune --batch-size auto --lr auto` does before training.

    DATA is as for `finetune`. Nothing is written except the plot that --picture asks for.
    """
    from flashtask.cli.tune import tune as run_tune

    run_tune(data, params)


@flashtask.command(short_help="Search for better values of a recipe.")
@click.argument("recipe")
@add_options(SWEEP + EVERYWHERE)
def sweep(recipe: str, **params: Any) -> None:
    """Train RECIPE many times, with values for the keys that it leaves open; each trial is a run folder.

    An open key has a range or a list: `learning_rate: {log: [1e-4, 1e-1]}`, `strategy: {choose: [freeze, no_freeze]}`.
    A sweep that was stopped goes on with the same command, and several processes may share one.
    """
    from flashtask.cli.sweep import sweep as run_sweep

    run_sweep(recipe, params)


@flashtask.command(short_help="Show what finetune would do, without training.")
@click.argument("data", required=False)
@add_options(PLAN + EVERYWHERE)
def plan(data: str | None, **params: Any) -> None:
    """Show for each phase of the strategy what trains, the learning rates, and estimates of time and memory.

    DATA is as for `finetune`. Nothing is trained and nothing is written; the estimates come from a few steps on copies.
    """
    from flashtask.cli.plan import plan as run_plan

    run_plan(data, params)


@flashtask.command(short_help="Answer predictions over HTTP.")
@click.argument("checkpoints", metavar="MODEL...", nargs=-1, required=True)
@add_options(SERVE + EVERYWHERE)
def serve(checkpoints: tuple[str, ...], **params: Any) -> None:
    """Serve each MODEL over HTTP: a page to try it, POST /predict, and the Open Inference protocol below /v2.

    MODEL is a run folder, a checkpoint, a folder in timm's layout or an address; NAME=MODEL gives it a name.
    """
    from flashtask.cli.serve import serve as run_serve

    run_serve(checkpoints, params)


@flashtask.command(short_help="Look for what is suspicious about images and labels.")
@click.argument("data", required=False)
@add_options(AUDIT + EVERYWHERE)
def audit(data: str | None, **params: Any) -> None:
    """Look for unreadable files, copies, suspected label errors and odd pictures in DATA.

    DATA is as for `finetune`. Nothing is changed. The exit code is 65 if something spoils a result: an unreadable file,
    a picture or a group in two parts, or a picture with two targets.
    """
    from flashtask.cli.audit_data import audit as run_audit

    run_audit(data, params)


@flashtask.command("learning-curve", short_help="Show what more labels would bring.")
@click.argument("data", required=False)
@add_options(LEARNING_CURVE + EVERYWHERE)
def learning_curve(data: str | None, **params: Any) -> None:
    """Show the accuracy by the number of labels of DATA, and name the images to label next.

    DATA is as for `finetune`, or a run folder. A head is fitted to the features of a frozen backbone; nothing is
    trained further, and the features are computed once.
    """
    from flashtask.cli.learning_curve import learning_curve as run_learning_curve

    run_learning_curve(data, params)


@flashtask.command(short_help="Draw images as a model gets them.")
@click.argument("data", required=False)
@add_options(SHOW + EVERYWHERE)
def show(data: str | None, **params: Any) -> None:
    """Draw images of DATA with their targets, after augmentation, as a model gets them.

    DATA is as for `finetune`.
    """
    from flashtask.cli.audit_data import show as run_show

    run_show(data, params)


@flashtask.command(short_help="Write images as tar files for large data.")
@click.argument("data")
@click.argument("folder", metavar="OUT")
@add_options(SHARD + EVERYWHERE)
def shard(data: str, folder: str, **params: Any) -> None:
    """Write DATA to OUT as tar files in the WebDataset layout, with an index; `flashtask finetune OUT` trains on them.

    DATA is as for `finetune`, and is split as `finetune` would split it. OUT is new or empty, and appears when it is
    whole.
    """
    from flashtask.cli.shard import shard as run_shard

    run_shard(data, folder, params)


@flashtask.command(short_help="Write annotations in another format.")
@click.argument("data")
@click.argument("folder", metavar="OUT")
@add_options(CONVERT + EVERYWHERE)
def convert(data: str, folder: str, **params: Any) -> None:
    """Write the boxes, outlines and keypoints of DATA to OUT in another format.

    DATA is a folder of COCO, Pascal VOC or YOLO, images beside masks, COCO's .json file, a data.yaml, or a table with a
    row a box. OUT is new or empty, and appears when it is whole. What the format cannot hold is named, and refused
    without --lossy.
    """
    from flashtask.cli.convert import convert as run_convert

    run_convert(data, folder, params)


@flashtask.command(short_help="Predict images.")
@click.argument("ckpt", metavar="MODEL")
@click.argument("images", nargs=-1, required=True, metavar="INPUT...")
@add_options(PREDICT + EVERYWHERE)
def predict(ckpt: str, images: tuple[str, ...], **params: Any) -> None:
    """Predict images, in the order in which they are given.

    MODEL is a run folder (its best checkpoint), a checkpoint, a folder that save_pretrained wrote, or hf://org/name.
    INPUT is an image file, a folder or an http(s) address. A folder means all images in it and its subfolders, sorted
    by path. A table (.csv, .tsv, .jsonl, .parquet) or a folder of shards is given alone. With --output, a job that was
    stopped is continued by the same command.
    """
    from flashtask.cli.own_zoo import use_option
    from flashtask.cli.predict import predict as run_predict

    use_option(params)
    run_predict(ckpt, images, params)


@flashtask.command(short_help="Compute the metrics of a model on validation data.")
@click.argument("ckpt", metavar="MODEL")
@click.argument("data", required=False)
@add_options(EVALUATE + EVERYWHERE)
def validate(ckpt: str, data: str | None, **params: Any) -> None:
    """Compute the metrics of MODEL on DATA/val, or on DATA itself if it has no val/.

    Without DATA, MODEL is a run folder, and the validation images of that run are used.

    MODEL is a run folder (its best checkpoint), a checkpoint, a folder that save_pretrained wrote, or hf://org/name.
    """
    from flashtask.cli.evaluate import evaluate
    from flashtask.cli.own_zoo import use_option

    use_option(params)
    evaluate("validate", ckpt, data, params)


@flashtask.command(short_help="Compute the metrics of a model on test data.")
@click.argument("ckpt", metavar="MODEL")
@click.argument("data", required=False)
@add_options(EVALUATE + EVERYWHERE)
def test(ckpt: str, data: str | None, **params: Any) -> None:
    """Compute the metrics of MODEL on DATA/test, or on DATA itself if it has no test/.

    Without DATA, MODEL is a run folder, and the test images of that run are used.

    MODEL is a run folder (its best checkpoint), a checkpoint, a folder that save_pretrained wrote, or hf://org/name.
    """
    from flashtask.cli.evaluate import evaluate
    from flashtask.cli.own_zoo import use_option

    use_option(params)
    evaluate("test", ckpt, data, params)


@flashtask.command(short_help="Show the licences of what a model is made of.")
@click.argument("ckpt", metavar="MODEL")
@add_options(LICENCE + EVERYWHERE)
def licence(ckpt: str, **params: Any) -> None:
    """Show the licences of the code, the pretrained weights, the data and the weights of MODEL, and what follows.

    MODEL is a run folder (its best checkpoint), a checkpoint, a folder that save_pretrained wrote, or hf://org/name.
    What nobody has stated is shown as unknown.
    """
    from flashtask.cli.licence import licence as run_licence

    run_licence(ckpt, params)


@flashtask.command(short_help="Write a page about a run.")
@click.argument("source", metavar="RUN_OR_CKPT")
@click.argument("data", required=False)
@add_options(REPORT + EVERYWHERE)
def report(source: str, data: str | None, **params: Any) -> None:
    """Write a page about RUN_OR_CKPT: curves, mistakes, calibration, slices, and more.

    The model is judged on the validation data of its run, or on DATA, which is as for `validate`. The page is one file
    that needs no network; `finetune` has written one already.
    """
    from flashtask.cli.own_zoo import use_option
    from flashtask.cli.report_page import report as run_report

    use_option(params)
    run_report(source, data, params)


@flashtask.command(short_help="Calibrate scores and choose when predictions are accepted.")
@click.argument("source", metavar="RUN_OR_CKPT")
@click.argument("data", required=False)
@add_options(OPERATE + EVERYWHERE)
def operate(source: str, data: str | None, **params: Any) -> None:
    """Calibrate the scores of RUN_OR_CKPT, choose thresholds of classes, and store both in the checkpoint.

    The validation data of its run is used, or DATA, which is as for `validate`. With thresholds, predictions are
    `accepted` or `unknown`. Labels and losses stay as they are, and each call replaces what was stored before.
    """
    from flashtask.cli.operate import operate as run_operate
    from flashtask.cli.own_zoo import use_option

    use_option(params)
    run_operate(source, data, params)


@flashtask.command(short_help="Train a model on new data, unless it forgets the old.")
@click.argument("model", metavar="RUN")
@click.argument("data")
@add_options(UPDATE + EVERYWHERE)
def update(model: str, data: str, **params: Any) -> None:
    """Train the model of RUN further on DATA and on the images that it was trained on, and compare old classes.

    RUN is a run folder or a checkpoint in one; DATA is as for `finetune`, and may have new classes. The exit code is 76
    if the recall of an old class on the old validation images falls by more than --allow; then nothing is replaced.
    """
    from flashtask.cli.update import update as run_update

    run_update(model, data, params)


@flashtask.command(short_help="Put runs beside each other.")
@click.argument("sources", metavar="RUN RUN...", nargs=-1, required=True)
@add_options(COMPARE + EVERYWHERE)
def compare(sources: tuple[str, ...], **params: Any) -> None:
    """Compare each RUN with the first: metrics, settings, classes, samples that flipped, and whether it may be luck.

    RUN is a run folder or a checkpoint. The models are judged on the validation data of their runs.
    """
    from flashtask.cli.compare import compare as run_compare

    run_compare(sources, params)


@flashtask.command(short_help="List the runs in a folder.")
@click.argument("folder", required=False)
@add_options(RUNS + EVERYWHERE)
def runs(folder: str | None, **params: Any) -> None:
    """List the finished runs in FOLDER and below it, by default in runs/."""
    from flashtask.cli.runs import runs as run_runs

    run_runs(folder, params)


@flashtask.command(short_help="Train a run once more and compare the bits.")
@click.argument("source", metavar="RUN")
@add_options(RERUN + EVERYWHERE)
def rerun(source: str, **params: Any) -> None:
    """Train the recipe of RUN again, and say whether weights, losses and metrics are the same bits."""
    from flashtask.cli.runs import rerun as run_rerun

    run_rerun(source, params)


@flashtask.command(short_help="List and search models, heads, tasks and recipes.")
@click.argument("words", nargs=-1, metavar="[QUERY] | show NAME | check FILE")
@add_options(ZOO + EVERYWHERE)
def zoo(words: tuple[str, ...], **params: Any) -> None:
    """List and search all entries, show everything about one name, or check a zoo file.

    QUERY is a part of a name, or a kind in the plural (backbones, heads, tasks, checkpoints, recipes). With one of the
    characters * + ? [ ] ( ) { } | ^ $ it is a regular expression for the whole name ('resnet.*').
    """
    from flashtask.cli.zoo import run_zoo

    run_zoo(words, params)


@flashtask.command(short_help="List or delete cached files.")
@click.argument("words", nargs=-1, metavar="[clear [KIND]]")
@add_options(CACHE + EVERYWHERE)
def cache(words: tuple[str, ...], **params: Any) -> None:
    """List what is cached between runs, or delete all of it or one KIND.

    KIND is features, checkpoints, hub, backbone_sizes or files (their hashes). Everything can be computed or
    downloaded again.
    """
    from flashtask.cli.cache import cache as run_cache

    run_cache(words, params)


@flashtask.command(short_help="Check a run or a checkpoint, and say how to resume it.")
@click.argument("source", metavar="RUN_OR_CKPT")
@add_options(DOCTOR + EVERYWHERE)
def doctor(source: str, **params: Any) -> None:
    """Read every checkpoint of RUN_OR_CKPT whole, and say which are sound and from which the run can be resumed.

    Nothing is changed. The exit code is 76 if a file is damaged or holds values that are not finite.
    """
    from flashtask.cli.doctor import doctor as run_doctor

    run_doctor(source, params["json"])


@flashtask.command(short_help="Publish a trained model on the hub.")
@click.argument("model", metavar="CKPT_OR_RUN_OR_FOLDER")
@click.argument("repository", metavar="ORG/NAME")
@add_options(PUSH + EVERYWHERE)
def push(model: str, repository: str, **params: Any) -> None:
    """Publish a trained model on the hub as ORG/NAME, in timm's layout and with a model card.

    The model is a checkpoint, a run folder (its best checkpoint), or a folder that save_pretrained wrote. With --space
    an app is published instead: a page on which people can try the model.
    """
    from flashtask.cli.own_zoo import use_option
    from flashtask.cli.push import push as run_push

    use_option(params)
    run_push(model, repository, params)


@flashtask.command(short_help="Download a model from the hub.")
@click.argument("address", metavar="ADDRESS")
@click.argument("folder", required=False)
@add_options(PULL + EVERYWHERE)
def pull(address: str, folder: str | None, **params: Any) -> None:
    """Download a model from the hub (ADDRESS is hf://org/name@revision) into FOLDER, by default ./name.

    The files are checked, and the folder appears when it is complete.
    """
    from flashtask.cli.push import pull as run_pull

    run_pull(address, folder)


@flashtask.command(short_help="Write a model as a file for another runtime.")
@click.argument("ckpt", metavar="MODEL")
@add_options(EXPORT + EVERYWHERE)
def export(ckpt: str, **params: Any) -> None:
    """Write MODEL as a file for ONNX Runtime, torch.export or OpenVINO, if it gives the same results there.

    MODEL is a run folder (its best checkpoint), a checkpoint, a folder that save_pretrained wrote, or hf://org/name.
    The file takes pictures as decoded: resize, crop and normalisation are in it. It is run on images before it is
    written. The exit code is 76 if it gives other results than MODEL.
    """
    from flashtask.cli.export import export as run_export
    from flashtask.cli.own_zoo import use_option

    use_option(params)
    run_export(ckpt, params)


@flashtask.command(short_help="Measure images per second on this machine.")
@click.argument("backbone", required=False)
@add_options(BENCH + EVERYWHERE)
def bench(backbone: str | None, **params: Any) -> None:
    """Measure BACKBONE on this machine, in images per second, and show what `auto` chooses and why.

    Each number format and memory format is measured, in inference and training, then prediction and decoding.
    BACKBONE is by default one whose weights are in an installed package, else resnet18. No weights are downloaded.
    """
    from flashtask.cli.bench import bench as run_bench
    from flashtask.cli.own_zoo import use_option

    use_option(params)
    run_bench(backbone, params)


@flashtask.command(short_help="Inject faults into training runs, and count what survives.")
@add_options(CHAOS + EVERYWHERE)
def chaos(**params: Any) -> None:
    """Inject faults into small training runs on this machine, resume each, and compare it with a run without faults.

    Processes are killed and stopped, files damaged, disks made full. Each fault is injected at least once. The exit
    code is 1 if one was not survived. If Lightning is installed, it gets the same faults.
    """
    from flashtask.cli.chaos.command import chaos as run_chaos

    run_chaos(params)
