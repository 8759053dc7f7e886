"""Names of arguments that a function does not have: answered with the nearest right one, and with what other libraries'
names for the same thing are called here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flashtask.core.errors import UnknownNameError, did_you_mean

__all__ = ["argument_fix", "named_arguments", "nearest_argument"]

F = TypeVar("F", bound=Callable[..., Any])

#: What fastai, Lightning, transformers, Keras, timm and ultralytics call it: our names, the likeliest first.
_OTHER_NAMES = {
    "amp": ("precision",),
    "arch": ("backbone",),
    "architecture": ("backbone",),
    "aug": ("augment",),
    "augmentation": ("augment",),
    "augmentations": ("augment",),
    "base_lr": ("learning_rate",),
    "base_model": ("backbone",),
    "batch": ("batch_size",),
    "batchsize": ("batch_size",),
    "bs": ("batch_size",),
    "cbs": ("callbacks",),
    "channels": ("in_chans",),
    "checkpoint": ("ckpt_path", "path"),
    "class_names": ("labels",),
    "classes": ("labels", "num_classes"),
    "clip_grad": ("gradient_clip_val",),
    "data": ("datamodule", "train_folder", "root"),
    "data_dir": ("train_folder", "root"),
    "dataloader": ("train_dataloaders", "train_dataloader", "dataloaders"),
    "device": ("accelerator", "map_location"),
    "dls": ("datamodule",),
    "dm": ("datamodule",),
    "encoder": ("backbone",),
    "epochs": ("max_epochs",),
    "feature_extractor": ("backbone",),
    "fp16": ("precision",),
    "freeze": ("strategy",),
    "grad_accum": ("accumulate_grad_batches",),
    "gradient_accumulation_steps": ("accumulate_grad_batches",),
    "grad_clip": ("gradient_clip_val",),
    "half": ("precision",),
    "images": ("inputs",),
    "img_size": ("image_size", "input_size"),
    "imgsz": ("image_size", "input_size"),
    "in_channels": ("in_chans",),
    "criterion": ("loss_fn",),
    "cutmix": ("cutmix_alpha",),
    "drop_path": ("drop_path_rate",),
    "ema": ("ema_decay",),
    "loss": ("loss_fn",),
    "loss_func": ("loss_fn",),
    "mixup": ("mixup_alpha",),
    "model_ema_decay": ("ema_decay",),
    "reprob": ("random_erasing",),
    "smoothing": ("label_smoothing",),
    "loader": ("train_dataloaders", "train_dataloader", "dataloaders"),
    "log_dir": ("output_dir",),
    "lr": ("learning_rate",),
    "lr_backbone": ("backbone_learning_rate",),
    "lr_max": ("learning_rate",),
    "max_grad_norm": ("gradient_clip_val",),
    "mixed_precision": ("precision",),
    "model": ("backbone",),
    "model_name": ("backbone",),
    "momentum": ('optimizer_options={"momentum": 0.9}',),
    "n_classes": ("num_classes",),
    "n_epoch": ("max_epochs",),
    "n_epochs": ("max_epochs",),
    "n_out": ("num_classes",),
    "n_workers": ("num_workers",),
    "names": ("labels",),
    "nb_epochs": ("max_epochs",),
    "nc": ("num_classes",),
    "network": ("backbone",),
    "num_epochs": ("max_epochs",),
    "num_labels": ("num_classes",),
    "num_train_epochs": ("max_epochs",),
    "opt": ("optimizer",),
    "opt_func": ("optimizer",),
    "optim": ("optimizer",),
    "out_dir": ("output_dir",),
    "path": ("train_folder", "root", "inputs"),
    "random_seed": ("seed", "split_seed"),
    "random_state": ("seed", "split_seed"),
    "resolution": ("image_size", "input_size"),
    "resume": ("ckpt_path",),
    "resume_from": ("ckpt_path",),
    "root": ("train_folder",),
    "root_dir": ("train_folder", "default_root_dir"),
    "save_dir": ("output_dir",),
    "sched": ("lr_scheduler",),
    "scheduler": ("lr_scheduler",),
    "size": ("image_size", "input_size"),
    "test_dir": ("test_folder",),
    "tfms": ("augment",),
    "train": ("train_folder", "train_dataloaders", "train_dataloader"),
    "train_dir": ("train_folder",),
    "train_dl": ("train_dataloaders", "train_dataloader"),
    "train_loader": ("train_dataloaders", "train_dataloader"),
    "train_path": ("train_folder",),
    "transforms": ("transform", "augment"),
    "val": ("val_folder", "val_dataloaders"),
    "val_dir": ("val_folder",),
    "val_dl": ("val_dataloaders",),
    "val_loader": ("val_dataloaders",),
    "val_pct": ("val_split",),
    "val_size": ("val_split",),
    "valid": ("val_folder",),
    "valid_dir": ("val_folder",),
    "valid_pct": ("val_split",),
    "validation_split": ("val_split",),
    "wd": ('optimizer_options={"weight_decay": 0.01}',),
    "weight_decay": ('optimizer_options={"weight_decay": 0.01}',),
    "weights": ("pretrained", "ckpt_path"),
    "workers": ("num_workers",),
}

_TASK, _DATA, _TRAINER = "ImageClassifier", "ImageClassificationData.from_folders", "Trainer"
#: The call that an argument belongs to, for those that are given to another one.
_PLACES = {
    **dict.fromkeys(("backbone", "backbone_learning_rate", "head", "head_options", "in_chans", "labels"), _TASK),
    **dict.fromkeys(("learning_rate", "lr_scheduler", "num_classes", "optimizer", "optimizer_options"), _TASK),
    **dict.fromkeys(("class_weights", "drop_path_rate", "image_size", "label_smoothing", "loss_fn"), _TASK),
    **dict.fromkeys(("cutmix_alpha", "metrics", "mixup_alpha", "monitor", "resize", "weight_decay"), _TASK),
    **dict.fromkeys(("flip", "random_erasing", "sampler"), _DATA),
    **dict.fromkeys(("ema_decay",), _TRAINER),
    **dict.fromkeys(("augment", "batch_size", "num_workers", "on_bad_image", "train_folder", "val_folder"), _DATA),
    **dict.fromkeys(("predict_folder", "split_seed", "test_folder", "val_split"), _DATA),
    **dict.fromkeys(("accelerator", "accumulate_grad_batches", "callbacks", "devices", "gradient_clip_val"), _TRAINER),
    **dict.fromkeys(("logger", "max_epochs", "max_steps", "output_dir", "precision", "seed"), _TRAINER),
    "ckpt_path": "trainer.fit",
    "input_size": "data.preprocessing = Preprocessing",
    "mean": "data.preprocessing = Preprocessing",
    "std": "data.preprocessing = Preprocessing",
    "strategy": "trainer.finetune",
}


def named_arguments(function: F) -> F:
    """Let a function or constructor answer a name that none of its arguments has with near matches.

    What a `**options` of its own takes is passed through.

    Raises:
        UnknownNameError: when it is called with such a name.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [name for name in names if name not in ("self", "cls")]

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                raise _unknown(name, known, function, arguments)
        return function(*arguments, **options)

    return checked  # type: ignore[return-value]


def nearest_argument(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for an argument's name elsewhere, or a mistyped one; empty if none is near."""
    known = list(known)
    if other := next((right for right in _other_names(name) if right in known), ""):
        return f"did you mean {other!r}?"
    return did_you_mean(name, known)


def argument_fix(name: str, known: Iterable[str]) -> str:
    """What to write in the place of an argument that a call does not have; empty if nothing is near.

    Args:
        name: as the user wrote it.
        known: the arguments that the call has.
    """
    known = list(known)
    others = _other_names(name)
    for right in others:
        if right.partition("=")[0] in known:
            return f"did you mean {right}?" if "=" in right else f"did you mean {right!r}?"
    for right in (name, *others):
        if place := _PLACES.get(right.partition("=")[0]):
            return f"set it in {place}({right}{'' if '=' in right else '=...'})"
    return did_you_mean(name, known)


def _other_names(name: str) -> tuple[str, ...]:
    return _OTHER_NAMES.get(name.lower().replace("-", "_"), ())


def _unknown(name: str, known: list[str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> UnknownNameError:
    """The error for a name that a call does not know; a task also takes the arguments of its subclasses."""
    all_names = getattr(arguments[0], "argument_names", None) if arguments else None
    if function.__name__ == "__init__" and all_names is not None:
        known = all_names()
    error = UnknownNameError(f"argument of {_called(function, arguments)}", name, known)
    instead = getattr(arguments[0], "instead", {}) if arguments else {}
    error.fix = instead.get(name) or argument_fix(name, known) or error.fix
    return error


def _called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """What a user wrote: the class of the object that is made, or the method."""
    if function.__name__ == "__init__" and arguments:
        return type(arguments[0]).__name__
    return f"{function.__name__}()"
