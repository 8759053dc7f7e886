"""Which value of a metric is the better one: more or less of it, and what decides between two that are equal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashtask.core.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["best_mode", "direction_of", "mode_of_module", "rank", "tie_break"]

#: Last words of names of which more is better.
_MORE = (
    "acc accuracy ap auc aucpr auprc auroc bleu corrcoef correlation dice f1 f1score f2 fbeta iou jaccard kappa map mar"
    " mcc miou npv pearson ppv precision psnr pq r2 r2score recall roc rocauc sensitivity spearman specificity ssim"
)
#: Last words of names of which less is better.
_LESS = (
    "bce brier ce cer cost crossentropy distance ece eer entropy err error fid fnr fpr hausdorff hinge kl logloss loss"
    " lpips mae mape mse msle nll perplexity ppl rmse rmsle smape wer"
)
_DIRECTIONS = {**dict.fromkeys(_MORE.split(), "max"), **dict.fromkeys(_LESS.split(), "min")}
#: Words at the end that describe how a metric is averaged or where it is logged, not what it measures.
_BESIDE = {"epoch", "step", "macro", "micro", "weighted", "mean", "avg", "average", "score", "rate", "top", "at"}


def direction_of(metric: str) -> str | None:
    """`max` or `min` for a metric whose name ends in a known word (`val_f1`, `cost/entropy`); None for any other.

    Words and numbers that only describe how it is averaged are ignored: `val_f1_macro`, `val_accuracy_top5`.
    """
    words = re.findall(r"[a-z]+[0-9]*|[0-9]+", re.sub(r"/dataloader_idx_\d+$", "", metric.lower()))
    for word in reversed(words):
        bare = word.rstrip("0123456789")
        for known in (word, bare):
            if known in _DIRECTIONS:
                return _DIRECTIONS[known]
        if bare and bare not in _BESIDE:
            return None
    return None


def best_mode(owner: str, metric: str, mode: str | None, module: Module) -> str:
    """`max` or `min`: as given, else that of the module for its own metric, else what the name of the metric implies.

    Args:
        owner: what asks, for the message: `EarlyStopping`.
        metric: its name.
        mode: what the user gave.
        module: whose own metric is `module.monitor`.

    Raises:
        UsageError: it is given nowhere.
    """
    if mode is None and metric == module.monitor:
        return mode_of_module(module)
    found = mode or direction_of(metric)
    if found is None:
        raise _asking_for_mode(owner, metric, module)
    return found


def _asking_for_mode(owner: str, metric: str, module: Module) -> UsageError:
    """The error for a name without a known direction; a name like that of a usual metric is most likely mistyped."""
    error = UnknownNameError("metric to monitor", metric, {module.monitor: 0, "val_loss": 0})
    example = f'{owner}(monitor={metric!r}, mode="max"), or mode="min" where less is better'
    if error.suggestions:
        error.fix = f"did you mean {error.suggestions[0]!r}? A metric of that name needs a mode: {example}"
        return error
    return UsageError(
        f"{owner}(monitor={metric!r}) needs a mode: the name does not say whether more or less is better", fix=example
    )


def mode_of_module(module: Module) -> str:
    """`max` or `min` for the module's own metric.

    A `monitor_mode` counts for the `monitor` of the same class or of a parent; a class that changes `monitor` alone
    has the mode that the name of its metric implies.

    Raises:
        UsageError: the name does not imply it.
    """
    places = [vars(module), *(vars(kind) for kind in type(module).__mro__)]
    level = {name: next(n for n, place in enumerate(places) if name in place) for name in ("monitor", "monitor_mode")}
    if level["monitor_mode"] <= level["monitor"]:
        mode: str = module.monitor_mode
        return mode
    found = direction_of(module.monitor)
    if found is None:
        raise UsageError(
            f"{type(module).__name__}.monitor is {module.monitor!r}, and its name does not say whether more or less "
            "of it is better",
            fix='monitor_mode = "max" (or "min") beside `monitor` in the class',
        )
    return found


def tie_break(metrics: Mapping[str, float]) -> float:
    """What decides between two places of a run with equal scores: their `val_loss`, infinite if it was not measured."""
    loss = float(metrics.get("val_loss", math.nan))
    return math.inf if math.isnan(loss) else loss


def rank(score: float, tied_by: float, mode: str) -> tuple[float, float]:
    """What places of a run are sorted by: the better one has the larger rank.

    Args:
        score: of the metric.
        tied_by: what `tie_break` gave for that place.
        mode: `max` or `min`.
    """
    return (score if mode == "max" else -score), -tied_by
