"""The one table of options: what a flag is called, which recipe key it is, what it takes.

The command line, the checks of a recipe's values and the table in docs/command-line.md are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from flashtask.cli.kinds import (
    Kind,
    auto_or,
    delimiter,
    devices,
    fold,
    image_size,
    magnitude,
    names,
    not_negative,
    one_of,
    positive,
    positive_share,
    probability,
    shard,
    share,
    share_of_class,
    steps,
    text,
    value_range,
    whole,
)
from flashtask.cli.option import CONSTRUCTOR, GROUPS, OF_SHARDS, OF_TABLES, OF_THE_HUB, GroupedOption, Option
from flashtask.cli.switches import SWITCHES
from flashtask.tasks.prediction_files import FILE_FORMATS

__all__ = [
    "AUDIT",
    "BENCH",
    "CACHE",
    "CHAOS",
    "COMPARE",
    "CONSTRUCTOR",
    "DOCTOR",
    "EVALUATE",
    "EVERYWHERE",
    "EXPORT",
    "FINETUNE",
    "GROUPS",
    "LEARNING_CURVE",
    "LICENCE",
    "OF_SHARDS",
    "OF_TABLES",
    "OF_THE_HUB",
    "OPERATE",
    "PLAN",
    "PREDICT",
    "PULL",
    "PUSH",
    "REPORT",
    "RERUN",
    "RUNS",
    "SERVE",
    "SHARD",
    "SHOW",
    "SWEEP",
    "TABLES",
    "TUNE",
    "UPDATE",
]
__all__ += ["ZOO", "GroupedOption", "Option", "add_options", "given", "kinds_by_key", "unset"]

_DATA = f"data.{CONSTRUCTOR}"
_DEVICE = one_of(["auto", "cpu", "gpu", "cuda", "mps"])
_NUMBER_FORMAT = one_of(
    [
        *("auto", "32", "32-true", "full", "bf16", "bf16-mixed", "16", "16-mixed"),
        *("16-true", "half", "bf16-true", "64", "64-true", "double"),
    ]
)
_POLICY = one_of(["error", "skip"])

_COLUMNS = (
    Option(
        "--input",
        f"data.{OF_TABLES}.input_field",
        text,
        "Table data: the column of image paths.",
        "COLUMN",
        "the only one with image paths",
        "Data",
    ),
    Option(
        "--target",
        f"data.{OF_TABLES}.target_fields",
        names,
        "Table data: the column of targets; several: a,b, or the option again.",
        "COLUMN",
        "the only other column",
        "Data",
        many=True,
    ),
    Option(
        "--delimiter",
        f"data.{OF_TABLES}.label_separator",
        delimiter,
        "Table data: what separates several labels in a cell; \\t is a tab.",
        "TEXT",
        "none: a cell holds one label",
        "Data",
    ),
    Option(
        "--root",
        f"data.{OF_TABLES}.images_root",
        text,
        "Table data: the folder that relative image paths count from.",
        "FOLDER",
        "that of the table",
        "Data",
    ),
    Option(
        "--load-image",
        f"{_DATA}.load_image",
        text,
        "What reads files of your own format, by name.",
        "NAME",
        "none: image files",
        "Data",
    ),
)
_ROWS = (
    Option(
        "--part",
        f"data.{OF_TABLES}.split_field",
        text,
        "Table data: the column with train, val or test for each row.",
        "COLUMN",
        "none; see --val-split",
        "Data",
    ),
    Option(
        "--group",
        f"data.{OF_TABLES}.group_field",
        text,
        "Table data: rows with one value here are never split.",
        "COLUMN",
        "none",
        "Data",
    ),
    Option(
        "--weight",
        f"data.{OF_TABLES}.weight_field",
        text,
        "Table data: how much each row counts in training.",
        "COLUMN",
        "none: all count alike",
        "Data",
    ),
)

_VALUE_RANGE = Option(
    "--value-range",
    f"{_DATA}.value_range",
    value_range,
    "Pixel values of black and white in 16-bit images.",
    "L,H",
    "the range found in training",
    "Data",
)
_BATCH_SIZE = Option("--batch-size", f"{_DATA}.batch_size", whole(1), "Images per batch.", "N", "32", "Data")
_NUM_WORKERS = Option(
    "--num-workers",
    f"{_DATA}.num_workers",
    whole(),
    "Worker processes that load data.",
    "N",
    "0 on a CPU, else up to 8",
    "Data",
)
_ON_BAD_IMAGE = Option(
    "--on-bad-image",
    f"{_DATA}.on_bad_image",
    _POLICY,
    "What to do with unreadable images: error or skip.",
    "P",
    "error",
    "Data",
)
_ACCELERATOR = Option(
    "--accelerator",
    "trainer.accelerator",
    _DEVICE,
    "Type of device: auto, cpu, gpu, cuda or mps.",
    "A",
    "auto",
    "Hardware",
)
_DEVICES = Option(
    "--devices",
    "trainer.devices",
    devices,
    "Number of devices (-1: all), or their indices: 0,2.",
    "N",
    "auto: 1",
    "Hardware",
)
_DISTRIBUTED = Option(
    "--distributed",
    "trainer.strategy",
    text,
    "Strategy for several devices: ddp, ddp_spawn, fsdp, ...",
    "D",
    "auto",
    "Hardware",
)
_NUM_NODES = Option(
    "--num-nodes",
    "trainer.num_nodes",
    whole(1),
    "Number of machines, whose processes torchrun or SLURM starts.",
    "N",
    "1",
    "Hardware",
)
_PRECISION = Option(
    "--precision",
    "trainer.precision",
    _NUMBER_FORMAT,
    "Number format: auto, 32, bf16-mixed, 16-mixed, ...",
    "P",
    "auto",
    "Hardware",
)
_OF_RESULTS = replace(_PRECISION, default="32, or the one that was set for the run")
_PLACE = (_ACCELERATOR, _DEVICES, _DISTRIBUTED, _NUM_NODES)
_QUIET = Option("--quiet", "trainer.enable_progress_bar", None, "Show no progress bar.", value=False, group="Output")
_NO_FEATURE_CACHE = Option(
    "--no-feature-cache",
    "trainer.feature_cache",
    None,
    "Run a frozen backbone in every epoch, without cached features.",
    value=False,
    group="Training",
)
_JSON = Option("--json", "", None, "Print only JSON on standard output.", group="Output")
_NO_REPORT = Option(
    "--no-report", "trainer.report", None, "Write no report.html to the run folder.", value=False, group="Output"
)
_SIZE_OR_AUTO = auto_or(whole(1))
_RATE_OR_AUTO = auto_or(positive)

_ZOO_FILE = Option(
    "--zoo", "zoo", text, "Your own zoo file, in addition to the built-in one.", "FILE", "$FLASHTASK_ZOO", "Recipe"
)

_MODEL = (
    Option(
        "--from",
        "model.from",
        text,
        "Start from a trained task: hf://org/name@revision, a folder or a .ckpt.",
        "SOURCE",
        group="Model",
    ),
    Option(
        "--backbone",
        "model.backbone",
        text,
        "Backbone; `flashtask zoo backbones` lists them. auto: one whose weights are installed, else resnet18.",
        "NAME",
        "auto",
        "Model",
    ),
    Option("--head", "model.head", text, "Head; `flashtask zoo heads` lists them.", "NAME", "linear", "Model"),
    Option(
        "--strategy",
        "finetune.strategy",
        text,
        "Finetuning strategy: freeze, no_freeze, freeze_unfreeze:5, lp_ft:5, gradual:1, lora:8, ...",
        "S",
        "freeze",
        "Finetuning",
    ),
)

_BUDGET = Option(
    "--budget",
    "finetune.budget",
    text,
    "Choose epochs, and the strategy unless given, by the speed measured here: 2min, 1h, best.",
    "TIME",
    "none",
    "Finetuning",
)

_OPTIMIZATION = (
    Option(
        "--backbone-lr",
        "model.backbone_learning_rate",
        positive,
        "Learning rate of the backbone.",
        "X",
        "a tenth of --lr; with --no-pretrained, --lr",
        "Finetuning",
    ),
    _PRECISION,
    Option("--seed", "trainer.seed", whole(0, 2**32 - 1), "Seed of all random numbers.", "N", "0", "Training"),
)

_FOLD = Option(
    "--fold",
    f"{_DATA}.fold",
    fold,
    "The fold of training images to validate on: 2/5.",
    "K/N",
    "none; see --val-split",
    "Data",
)
_GROUP_PATTERN = Option(
    "--group-pattern",
    f"{_DATA}.group_pattern",
    str,
    "Images whose paths match with one first group are never split.",
    "REGEX",
    "none",
    "Data",
)

_SEVERAL = (
    Option(
        "--repeats",
        "repeats",
        whole(2),
        "Train N times, each repeat with the next seed.",
        "N",
        "once",
        "Training",
    ),
    Option(
        "--folds",
        "folds",
        whole(2),
        "Train once for each of N folds of the training images.",
        "N",
        "none; see --val-split",
        "Training",
    ),
    Option(
        "--vary",
        "vary",
        one_of(["seed", "split", "both"]),
        "Which seed differs between repeats: seed (of the training), split or both.",
        "V",
        "seed",
        "Training",
    ),
)

_IMAGES = (
    Option(
        "--val-split",
        f"{_DATA}.val_split",
        share,
        "Share or number of training images to validate on; 0 for none.",
        "F",
        "0.2 if DATA has no validation images",
        "Data",
    ),
    _FOLD,
    _GROUP_PATTERN,
    _NUM_WORKERS,
    _ON_BAD_IMAGE,
    _VALUE_RANGE,
    *_COLUMNS,
    *_ROWS,
)

_REST = (
    *_PLACE,
    *SWITCHES,
    Option("--multi-label", "model.multi_label", None, "An image can have any number of labels.", group="Model"),
    Option("--no-pretrained", "model.pretrained", None, "Start from random weights.", value=False, group="Model"),
    Option("--task", "task", text, "Task; `flashtask zoo tasks` lists them.", "NAME", "what the data is for", "Model"),
    Option("--config", "", text, "A recipe file; other options override its keys.", "FILE", group="Recipe"),
    Option("--recipe", "", text, "A recipe of the zoo; `flashtask zoo recipes` lists them.", "NAME", group="Recipe"),
    _ZOO_FILE,
    Option(
        "--set",
        "",
        text,
        "Set any recipe key: trainer.min_epochs=5.",
        "KEY=VALUE",
        many=True,
        group="Recipe",
    ),
    _NO_FEATURE_CACHE,
    _QUIET,
)

FINETUNE = (
    *_MODEL,
    _BUDGET,
    Option(
        "--epochs",
        "trainer.max_epochs",
        whole(1),
        "Number of passes over the training data.",
        "N",
        "10; no limit with --max-steps",
        "Training",
    ),
    Option(
        "--batch-size",
        f"{_DATA}.batch_size",
        _SIZE_OR_AUTO,
        "Images per batch; auto: as many as fit in memory.",
        "N",
        "32",
        "Data",
    ),
    Option(
        "--lr",
        "model.learning_rate",
        _RATE_OR_AUTO,
        "Learning rate of the head; auto: from a range test.",
        "X",
        "0.01",
        "Finetuning",
    ),
    *_OPTIMIZATION,
    Option("--output-dir", "trainer.output_dir", text, "Run folder.", "RUN", "the next free runs/NNN", "Output"),
    Option("--resume", "", None, "Continue the run in --output-dir, or start it if there is none.", group="Output"),
    *_IMAGES,
    Option(
        "--max-steps", "trainer.max_steps", steps, "Stop after N optimizer steps; -1: no limit.", "N", "-1", "Training"
    ),
    *_SEVERAL,
    *_REST,
    Option("--licence", "licences.weights", text, "Licence of the trained weights.", "NAME", "none", "Output"),
    Option("--data-licence", "licences.data", text, "Licence of the data.", "NAME", "none", "Output"),
    _NO_REPORT,
)

TUNE = (
    *_MODEL,
    Option(
        "--batch-size",
        f"{_DATA}.batch_size",
        _SIZE_OR_AUTO,
        "Use this batch size, and search only for a learning rate.",
        "N",
        "auto",
        "Data",
    ),
    Option(
        "--lr",
        "model.learning_rate",
        _RATE_OR_AUTO,
        "Use this learning rate, and search only for a batch size.",
        "X",
        "auto",
        "Finetuning",
    ),
    *_OPTIMIZATION,
    *_IMAGES,
    *_REST,
    Option("--picture", "", text, "Write a plot of the loss over the learning rate.", "FILE", group="Output"),
    _JSON,
)

PLAN = (
    *(option for option in FINETUNE if option.flag not in ("--resume", "--no-report") and option not in _SEVERAL),
    Option("--no-measure", "", None, "Do not estimate memory and time.", group="Output"),
    _JSON,
)

EVALUATE = (
    *_COLUMNS,
    replace(_ROWS[0], default="none: all rows count"),
    _BATCH_SIZE,
    _NUM_WORKERS,
    _ON_BAD_IMAGE,
    _VALUE_RANGE,
    *_PLACE,
    _OF_RESULTS,
    _ZOO_FILE,
    _QUIET,
    Option("--per-class", "", None, "Also print the metrics of each class.", group="Output"),
    _JSON,
)

REPORT = (
    Option("--of", "", one_of(["val", "test"]), "Part of the data.", "P", "val, else test", "Selection"),
    Option(
        "--format",
        "",
        one_of(["html", "json", "png"]),
        "html, json, or png: the charts as one picture.",
        "F",
        "from the ending of --output, else html",
        "Output",
    ),
    Option("--output", "", text, "File to write.", "FILE", "report.html in RUN; for other data here", "Output"),
    Option("--slices", "", names, "Columns that samples are sliced by.", "COLUMN,...", "all", "Selection"),
    *(option for option in EVALUATE if option.flag not in ("--per-class", "--json")),
)

COMPARE = (
    Option("--of", "", one_of(["val", "test"]), "Part of the data.", "P", "val", "Selection"),
    Option("--data", "", text, "Judge all runs on this data, in place of their own.", "DATA", "their own", "Data"),
    Option("--output", "", text, "Also write a page.", "FILE.html", "none", "Output"),
    *(option for option in EVALUATE if option.flag != "--per-class"),
)

OPERATE = (
    Option("--of", "", one_of(["val", "test"]), "Part of the data.", "P", "val", "Selection"),
    Option(
        "--recall",
        "",
        share_of_class,
        "Share of the images of a class that reach its threshold; may be given more than once.",
        "CLASS=X",
        "none",
        "Selection",
        many=True,
    ),
    Option(
        "--class-precision",
        "",
        share_of_class,
        "Share of what reaches the threshold that is of the class; may be given more than once.",
        "CLASS=X",
        "none",
        "Selection",
        many=True,
    ),
    Option(
        "--coverage",
        "",
        positive_share,
        "Share of the images to accept: those with the highest scores.",
        "X",
        "none",
        "Selection",
    ),
    Option("--abstain-below", "", positive_share, "Score below which nothing is accepted.", "X", "none", "Selection"),
    Option("--clear", "", None, "Remove temperature and thresholds from the checkpoint.", group="Selection"),
    Option("--output", "", text, "Checkpoint to write.", "FILE.ckpt", "the file is replaced", "Output"),
    # In one process and in float32, as the scores of `predict` are.
    *(option for option in EVALUATE if option not in (*_PLACE[1:], _OF_RESULTS) and option.flag != "--per-class"),
)

RUNS = (
    Option("--sort", "", text, "Column to sort by; -COLUMN: from large to small.", "COLUMN", "the path", "Selection"),
    Option(
        "--where",
        "",
        text,
        "Only runs of which this holds: NAME=PATTERN, 'NAME<X' or 'NAME>X'; may be given more than once.",
        "CONDITION",
        "all runs",
        "Selection",
        many=True,
    ),
    Option("--output", "", text, "Also write a page.", "FILE.html", "none", "Output"),
    _JSON,
)

RERUN = (
    Option("--output-dir", "", text, "Folder of the repeat.", "F", "RUN-again", "Output"),
    replace(_QUIET, key=""),
    _JSON,
)

PREDICT = (
    Option("--top-k", "", whole(1), "Number of labels per image, best first.", "K", "1", "Output"),
    Option("--scores", "", one_of(["best", "all"]), "best, or all: the scores of all labels.", "S", "best", "Output"),
    Option(
        "--format",
        "",
        one_of(["table", "csv", "json", "jsonl", "parquet", *FILE_FORMATS]),
        f"Output format: table, csv, json, jsonl or parquet; for some tasks also {', '.join(FILE_FORMATS)}.",
        "F",
        "from the ending of --output, else table",
        "Output",
    ),
    Option(
        "--output", "", text, "Output file, which appears when it is complete.", "FILE", "standard output", "Output"
    ),
    Option("--draw", "", text, "Folder for a picture of each image with its prediction.", "FOLDER", group="Output"),
    Option(
        "--batch-size", "", whole(1), "Images per batch.", "N", "16 on a CPU for 32 images or more, else 64", "Data"
    ),
    Option("--num-workers", "", whole(), "Worker processes that load images.", "N", "0 on a CPU, else up to 8", "Data"),
    Option(
        "--on-bad-image",
        "",
        one_of(["error", "skip", "row"]),
        "What to do with unreadable images: error, skip, or row: a row with the reason.",
        "P",
        "row for parquet, else error",
        "Data",
    ),
    replace(_COLUMNS[0], key=""),
    replace(_COLUMNS[3], key=""),
    Option(
        "--engine",
        "",
        one_of(["local", "ray"]),
        "local, or ray: actors on a Ray cluster, as many as --devices.",
        "E",
        "local",
        "Hardware",
    ),
    Option("--shard", "", shard, "Only this of N equal parts, for jobs side by side: 3/16.", "K/N", "all", "Data"),
    replace(_VALUE_RANGE, key=""),
    *_PLACE,
    _OF_RESULTS,
    _ZOO_FILE,
)

ZOO = (
    Option(
        "--kind",
        "",
        one_of(["backbone", "head", "task", "checkpoint", "recipe"]),
        "Only this kind: backbone, head, task, checkpoint or recipe.",
        "KIND",
        "all",
        "Selection",
    ),
    Option(
        "--source",
        "",
        text,
        "Only entries from this source: timm, torchvision, zoo, a package.",
        "NAME",
        "any",
        "Selection",
    ),
    Option("--licence", "", text, "Only weights with this licence: apache-2.0, mit, ...", "NAME", "any", "Selection"),
    Option(
        "--input-size",
        "",
        image_size,
        "Only backbones for this image size: 224, 224x192.",
        "N",
        "any",
        "Selection",
    ),
    Option(
        "--min-params",
        "",
        magnitude,
        "Only backbones with at least this many parameters: 500k, 10M.",
        "N",
        "any",
        "Selection",
    ),
    Option("--max-params", "", magnitude, "Only backbones with at most this many parameters.", "N", "any", "Selection"),
    Option("--pretrained", "", None, "Only backbones with pretrained weights.", group="Selection"),
    Option("--cached", "", None, "Only backbones whose weights are on this machine.", group="Selection"),
    _ZOO_FILE,
    _JSON,
)

CACHE = (_JSON,)

_BACKBONE = Option("--backbone", "", text, "", "NAME", group="Model")
_OF_THE_DATA = (
    next(option for option in _IMAGES if option.flag == "--val-split"),
    _FOLD,
    _GROUP_PATTERN,
    _VALUE_RANGE,
    *_COLUMNS,
    *(option for option in _ROWS if option.flag in ("--part", "--group")),
    *(option for option in _REST if option.flag in ("--multi-label", "--task", "--config", "--set")),
    _ZOO_FILE,
)

AUDIT = (
    replace(_BACKBONE, help="Also find label errors and neighbours by its features.", default="none"),
    *_OF_THE_DATA,
    Option("--ignore", "", text, "A file with findings to leave out, a line each.", "FILE", group="Selection"),
    Option("--html", "", text, "Write a page with thumbnails.", "FILE", group="Output"),
    _JSON,
)

SHOW = (
    replace(_BACKBONE, help="Draw what this backbone gets.", default="auto"),
    *_OF_THE_DATA,
    next(option for option in SWITCHES if option.flag == "--augment"),
    Option("--of", "", one_of(["train", "val", "test", "predict"]), "Part of the data.", "P", "train", "Selection"),
    Option("--num", "", whole(1), "Number of images.", "N", "12", "Selection"),
    Option("--epoch", "", whole(), "Epoch whose order and augmentation is drawn.", "N", "0", "Selection"),
    Option("--seed", "", whole(0, 2**32 - 1), "Seed of the run.", "N", "0", "Selection"),
    Option("--output", "", text, "Image file.", "FILE", "batch.png", "Output"),
)

LEARNING_CURVE = (
    replace(_BACKBONE, help="Backbone whose features are used.", default="that of the recipe or run, else auto"),
    *_OF_THE_DATA,
    Option("--sizes", "", names, "Numbers of labels: 50,100,200.", "N,N", "all, a half, a quarter, ...", "Selection"),
    Option("--draws", "", whole(2), "Draws of the images of each size.", "N", "10", "Selection"),
    Option("--seed", "", whole(0, 2**32 - 1), "Seed of the draws.", "N", "0", "Selection"),
    Option("--unlabelled", "", text, "Images of which some are to be labelled next.", "FOLDER", "none", "Data"),
    Option("--next", "", whole(1), "How many of them to name.", "N", "100", "Selection"),
    Option("--output", "", text, "Write their paths to this file, a line each.", "FILE", "printed", "Output"),
    Option("--picture", "", text, "Draw the curve: curve.png, curve.svg, ...", "FILE", group="Output"),
    Option("--page", "", text, "Write a page with the curve and the table.", "FILE.html", "none", "Output"),
    _JSON,
)

SHARD = (
    Option("--shard-size", "", whole(1), "Megabytes in a tar file.", "MB", "268", "Output"),
    *_OF_THE_DATA,
    next(option for option in _ROWS if option.flag == "--weight"),
    _ON_BAD_IMAGE,
    _JSON,
)

CONVERT = (
    Option(
        "--format",
        "",
        one_of(["coco", "voc", "yolo", "csv", "png"]),
        "coco, voc, yolo, csv or png.",
        "F",
        "coco",
        "Output",
    ),
    Option("--lossy", "", None, "Convert although something is lost.", group="Output"),
    Option("--copy-images", "", None, "Copy the images; else they stay where they are.", group="Output"),
    _JSON,
)

UPDATE = (
    *(option for option in FINETUNE if option.flag in ("--epochs", "--lr", "--strategy", "--val-split")),
    Option("--allow", "", not_negative, "Percentage points that an old class may fall.", "X", "2", "Selection"),
    Option("--replay", "", whole(1), "Old training images that are trained on again.", "N", "all", "Selection"),
    Option("--output-dir", "", text, "Run folder.", "F", "RUN-updated", "Output"),
    Option("--install", "", text, "File that the new model replaces if it is accepted.", "FILE", "none", "Output"),
    _NO_REPORT,
    _QUIET,
    _JSON,
)

DOCTOR = (_JSON,)

BENCH = (
    Option("--batch-size", "", whole(1), "Images per batch.", "N", "32", "Data"),
    Option("--seconds", "", positive, "Seconds to measure each option.", "X", "2", "Hardware"),
    Option("--accelerator", "", _DEVICE, "Type of device: auto, cpu, gpu, cuda or mps.", "A", "auto", "Hardware"),
    Option("--compile", "", None, "Also measure torch.compile; compiling takes a while.", group="Hardware"),
    _ZOO_FILE,
    _JSON,
)

CHAOS = (
    Option("--minutes", "", positive, "Begin no new fault after this time; each is injected once.", "N", "10"),
    Option("--seed", "", whole(), "Decides the moment and place of every fault.", "N", "a random one"),
    Option(
        "--output-dir",
        "",
        text,
        "Folder for the list of injections, and the runs that did not survive.",
        "F",
        "chaos-SEED",
        "Output",
    ),
    _JSON,
)

SERVE = (
    Option("--host", "", text, "Address to listen on; 0.0.0.0 lets other machines in.", "HOST", "127.0.0.1", "Output"),
    Option("--port", "", whole(0), "Port to listen on; 0 takes a free one.", "N", "8000", "Output"),
    Option("--accelerator", "", _DEVICE, "Type of device: auto, cpu, gpu, cuda or mps.", "A", "auto", "Hardware"),
    replace(_OF_RESULTS, key=""),
    Option("--max-bytes", "", whole(1), "Bytes of a request.", "N", "33554432", "Other"),
    Option("--max-images", "", whole(1), "Images of a request.", "N", "64", "Other"),
    Option("--max-pixels", "", whole(1), "Width times height of an image.", "N", "64000000", "Other"),
    Option("--max-waiting", "", whole(1), "Images of all requests that may wait.", "N", "256", "Other"),
    Option("--timeout", "", positive, "Seconds that a request may take.", "X", "30", "Other"),
    Option(
        "--cors",
        "",
        text,
        "Origin whose pages may ask, or *; may be given more than once.",
        "ORIGIN",
        "none",
        many=True,
    ),
    Option("--allow-urls", "", None, "Fetch images from addresses that clients send; never from private ones."),
    Option("--corrections", "", text, "Folder that stores answers marked as wrong on the page.", "F", "none stored"),
    Option(
        "--write-dockerfile", "", text, "Write a folder with a Dockerfile and the models, and end.", "FOLDER", "none"
    ),
)

SWEEP = (
    Option("--trials", "", whole(1), "Trials in all, with those of earlier calls.", "N", "20", "Training"),
    Option("--time", "", text, "Begin no new trial after this time: 90s, 10min, 2h.", "T", "no limit", "Training"),
    Option("--seed", "", whole(), "Seed of the proposals.", "N", "a random one", "Training"),
    Option("--no-pruning", "", None, "End no trial early for being worse than the median.", group="Training"),
    Option("--output-dir", "", text, "Folder of the study and the runs.", "F", "sweeps/RECIPE", "Output"),
    Option(
        "--storage", "", text, "Database of the study, which several machines may share.", "URL", "F/study.db", "Output"
    ),
    _JSON,
)

PUSH = (
    Option("--private", "", None, "Make a new repository private.", group="Hub"),
    Option("--revision", "", text, "Branch, created if it does not exist.", "BRANCH", "main", "Hub"),
    Option("--message", "", text, "Commit message.", "TEXT", "Upload NAME with flashtask VERSION", "Hub"),
    Option(
        "--licence",
        "",
        text,
        "Licence of the weights, for the model card: apache-2.0, mit, ...",
        "NAME",
        "the one in MODEL",
        "Hub",
    ),
    Option("--onnx", "", None, "Also put the model into the repository as model.onnx.", group="Hub"),
    Option(
        "--space", "", None, "Publish a Space in place of a model: an app of Gradio that asks the model.", group="Hub"
    ),
    Option("--write", "", text, "With --space: write its files here, and push nothing.", "FOLDER", "push them", "Hub"),
    Option("--dry-run", "", None, "List what would be pushed, without contacting the hub.", group="Hub"),
    _ZOO_FILE,
)

LICENCE = (_JSON,)

PULL: tuple[Option, ...] = ()

EXPORT = (
    Option(
        "--output", "", text, "The file: NAME.onnx, NAME.pt2 or NAME.xml.", "FILE", "beside the checkpoint", "Output"
    ),
    Option(
        "--format",
        "",
        one_of(["onnx", "torch", "openvino"]),
        "onnx, torch (torch.export) or openvino.",
        "F",
        "from the ending of --output, else onnx",
        "Output",
    ),
    Option(
        "--dynamic",
        "",
        names,
        "What may differ from call to call: batch, size, both (batch,size) or none.",
        "AXES",
        "batch,size; without preprocessing batch",
        "Output",
    ),
    Option(
        "--quantize",
        "",
        one_of(["int8"]),
        "int8: weights and activations in 8 bits; needs --data.",
        "Q",
        "none",
        "Output",
    ),
    Option(
        "--max-loss",
        "",
        probability,
        "How much of the metric --quantize may cost.",
        "X",
        "0.005: half a point",
        "Output",
    ),
    Option("--no-preprocessing", "", None, "Take normalised inputs (N, 3, H, W) in place of pictures.", group="Output"),
    Option("--data", "", text, "Validation data to compare on.", "DATA", "eight made-up pictures", "Data"),
    Option(
        "--licence",
        "",
        text,
        "Licence of the weights, for the metadata: apache-2.0, ...",
        "NAME",
        "the one in MODEL",
        "Output",
    ),
    Option("--overwrite", "", None, "Replace files that are there.", group="Output"),
    _ZOO_FILE,
    _JSON,
)

EVERYWHERE = (Option("--debug", "", None, "Show the traceback of an error."),)

#: What each command takes, in the order of the docs.
TABLES = {
    "finetune": FINETUNE,
    "tune": TUNE,
    "plan": PLAN,
    "audit": AUDIT,
    "show": SHOW,
    "shard": SHARD,
    "convert": CONVERT,
    "predict": PREDICT,
    "validate": EVALUATE,
    "test": EVALUATE,
    "zoo": ZOO,
    "push": PUSH,
    "pull": PULL,
    "licence": LICENCE,
    "export": EXPORT,
    "cache": CACHE,
    "doctor": DOCTOR,
    "report": REPORT,
    "bench": BENCH,
    "chaos": CHAOS,
    "serve": SERVE,
    "sweep": SWEEP,
    "update": UPDATE,
    "compare": COMPARE,
    "runs": RUNS,
    "rerun": RERUN,
    "learning-curve": LEARNING_CURVE,
    "operate": OPERATE,
}

Function = TypeVar("Function", bound=Callable[..., Any])


def add_options(options: Iterable[Option]) -> Callable[[Function], Function]:
    """The decorator that adds options to a click command, in their order."""

    def decorate(function: Function) -> Function:
        for option in reversed([*options]):
            function = option.as_click()(function)  # type: ignore[assignment]
        return function

    return decorate


def given(options: Iterable[Option], params: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """What the user typed of the options that are recipe keys: key -> (flag, value)."""
    found = {}
    for option in options:
        value = params.get(option.name)
        if option.many and option.key:
            value = _flat(value or ())
        if option.key and value is not None and value is not False:
            found[option.key] = (option.flag, option.value if option.kind is None else value)
    return found


def unset(options: Iterable[Option]) -> dict[str, Any]:
    """The parameters of a command of whose options none is given."""
    return {option.name: () if option.many else False if option.kind is None else None for option in options}


def _flat(values: Iterable[Any]) -> Any:
    """What an option that may be repeated holds: nothing, one value, or a list of all."""
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return parts if len(parts) > 1 else parts[0] if parts else None


def kinds_by_key() -> dict[str, Kind]:
    """What the value of a recipe key must be, for the keys that the table has."""
    return {option.key: option.kind for option in FINETUNE if option.key and option.kind is not None}
