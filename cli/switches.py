"""The switches of training: each declared once, as an option, a recipe key and an argument in Python.

`flashtask finetune`, `tune` and `plan` take them, the tables in docs/training-options.md and docs/command-line.md are
made from them, and tests compare their defaults with the signatures. A new switch is an argument of the class that uses
it, and a line here.
"""

from __future__ import annotations

from flashtask.cli.kinds import (
    Kind,
    below_one,
    choice,
    image_size,
    names,
    not_negative,
    one_of,
    probability,
    text,
    weights,
)
from flashtask.cli.option import CONSTRUCTOR, Option
from flashtask.core.preprocessing import RESIZES

__all__ = ["SWITCHES"]

_IMAGES, _AUGMENTATION, _LOSS, _FINETUNING = "Images", "Augmentation", "Loss and metrics", "Finetuning"


def _switch(group: str, key: str, kind: Kind, metavar: str, default: str, meaning: str, flag: str = "") -> Option:
    """An option that is called as the argument that it sets, unless a flag is given."""
    return Option(flag or "--" + key.rpartition(".")[2].replace("_", "-"), key, kind, meaning, metavar, default, group)


_DATA = f"data.{CONSTRUCTOR}"

SWITCHES = (
    _switch(
        _IMAGES,
        "model.image_size",
        image_size,
        "N",
        "the backbone's own",
        "Size of the images in pixels: 160, or height x width: 160x224.",
    ),
    _switch(
        _IMAGES,
        "model.resize",
        one_of([*RESIZES]),
        "R",
        "the backbone's own",
        "How images get this size: crop, pad, squash, or tile (segmentation).",
    ),
    _switch(
        _IMAGES,
        "model.tile_overlap",
        below_one,
        "X",
        "0.25",
        "Share of a tile that the next one has too, with --resize tile.",
    ),
    _switch(
        _AUGMENTATION,
        f"{_DATA}.augment",
        text,
        "A",
        "auto: none while the backbone is frozen, then light",
        "Augmentation: auto, none, light, medium, strong, trivial_augment, rand_augment or aug_mix.",
    ),
    _switch(
        _AUGMENTATION,
        f"{_DATA}.flip",
        one_of(["none", "horizontal", "vertical", "both"]),
        "F",
        "horizontal",
        "How the augmentation flips images: none, horizontal, vertical or both.",
    ),
    _switch(
        _AUGMENTATION,
        f"{_DATA}.random_erasing",
        probability,
        "P",
        "that of --augment",
        "Probability that a part of an image is erased.",
    ),
    _switch(
        _AUGMENTATION,
        "model.mixup_alpha",
        not_negative,
        "X",
        "0",
        "MixUp with shares from Beta(X, X), such as 0.2.",
    ),
    _switch(
        _AUGMENTATION,
        "model.cutmix_alpha",
        not_negative,
        "X",
        "0",
        "CutMix with shares from Beta(X, X), such as 1.",
    ),
    _switch(
        _LOSS,
        "model.loss_fn",
        choice,
        "NAME",
        "that of the task: cross_entropy, bce or huber",
        "Loss: cross_entropy, focal, bce, asymmetric, huber, ...; with arguments: focal:gamma=3.",
        "--loss",
    ),
    _switch(_LOSS, "model.label_smoothing", below_one, "X", "0", "Label smoothing of the training loss, below 1."),
    _switch(
        _LOSS,
        "model.class_weights",
        weights,
        "W",
        "all equal",
        "Weights of classes in the loss: balanced, effective_number, or cat=1,dog=2.5.",
    ),
    _switch(
        _LOSS,
        f"{_DATA}.sampler",
        one_of(["balanced", "weighted"]),
        "S",
        "each image once an epoch",
        "Draw images: balanced (classes equally often) or weighted (by weight_field).",
    ),
    _switch(
        _LOSS,
        "model.metrics",
        names,
        "NAMES",
        "those of the task",
        "Further metrics: f1_macro,auroc,mcc,f1_per_class,...",
    ),
    _switch(
        _LOSS,
        "model.monitor",
        text,
        "NAME",
        "that of the task: val_accuracy, val_map or val_mae",
        "Metric that decides which epoch is best: val_f1_macro, val_loss, ...",
    ),
    _switch(_FINETUNING, "model.optimizer", text, "NAME", "adamw", "Optimizer of torch or timm: adamw, sgd, lamb, ..."),
    _switch(
        _FINETUNING,
        "model.weight_decay",
        not_negative,
        "X",
        "the optimizer's own: 0.01 for adamw",
        "Weight decay, not applied to norms and biases.",
    ),
    _switch(
        _FINETUNING,
        "model.drop_path_rate",
        below_one,
        "X",
        "the backbone's own",
        "Stochastic depth of the backbone in training, from 0 to below 1.",
    ),
    _switch(
        "Training",
        "trainer.gradient_clip_val",
        not_negative,
        "X",
        "no limit",
        "Limit for the norm of all gradients.",
    ),
    _switch(
        "Training",
        "trainer.ema_decay",
        below_one,
        "X",
        "no average",
        "Keep a moving average of the weights with this decay: 0.999.",
    ),
)
