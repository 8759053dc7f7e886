"""How well temperatures and thresholds that were found on half of the validation images hold on the other half.

    python benchmarks/operating_points.py RUN CLASS [--recall X] [--splits N]

RUN is the folder of a classification run. Its model is judged once; then each split draws half of the validation
images, fits on them what `flashtask operate RUN --recall CLASS=X` fits, and measures on the others.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from flashtask import FinishedRun
from flashtask.reports.confidence import (
    conformal_rank,
    fitted_temperature,
    lower_bound,
    probabilities,
    scores_calibration,
    threshold_for_recall,
)
from flashtask.tasks.operating import _measured


def main() -> None:
    """Print the calibration error and the recall of the halves that were left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("label")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--splits", type=int, default=100)
    given = parser.parse_args()
    run = FinishedRun(given.run)
    own = run.task.labels.index(given.label)
    outputs, truth, _ = _measured(run.task, run.data, "val", None)
    logits, generator = outputs.double().numpy(), np.random.default_rng(0)
    rows = []
    for _ in range(given.splits):
        order = generator.permutation(len(logits))
        first, other = order[: len(order) // 2], order[len(order) // 2 :]
        temperature = fitted_temperature(logits[first], truth[first], exclude=True)
        plain, scores = (probabilities(logits / one, exclude=True) for one in (1.0, temperature))
        errors = [scores_calibration(one[other], truth[other], exclude=True).error for one in (plain, scores)]
        errors += [-np.log(one[other][truth[other]]).mean() for one in (plain, scores)]
        threshold = threshold_for_recall(scores[first, own], truth[first, own], given.recall)
        support = int(truth[first, own].sum())
        place = conformal_rank(support, given.recall)
        least = lower_bound(support + 1 - place, support)
        says, is_class = scores[other, own] >= threshold, truth[other, own]
        said = scores[other].argmax(axis=1)
        missed = ~says & (said != own) & is_class
        rows.append([temperature, *errors, says[is_class].mean(), least, is_class[says].mean(), missed.sum()])
        # Of images in any order the hits of the other half have a beta-binomial distribution.
        chance = generator.binomial(is_class.sum(), generator.beta(support + 1 - place, place, 1000)) / is_class.sum()
        rows[-1] += [(says == (said == own)).mean(), (chance >= given.recall).mean(), (chance >= least).mean()]
    found = np.array(rows)
    names = ("temperature", "calibration error before", "calibration error after", "cross-entropy before")
    names += ("cross-entropy after", "recall", "bound on the recall", "precision")
    names += ("images of the class accepted as another", "accepted share")
    print(f"{given.run}: {len(logits)} images, {int(truth[:, own].sum())} of {given.label}; {given.splits} halves")
    for name, column in zip(names, found.T, strict=False):
        low, high = np.quantile(column, [0.05, 0.95])
        print(f"{name}: mean {column.mean():.4f}, 5 % to 95 %: {low:.4f} to {high:.4f}")
    print(f"halves with a lower calibration error: {share(found[:, 2] < found[:, 1])}")
    print(f"halves with a lower cross-entropy: {share(found[:, 4] < found[:, 3])}")
    theory = found[:, -2:].mean(axis=0)
    reached = f"halves with a recall of {given.recall:g} or more: {share(found[:, 5] >= given.recall)}"
    print(f"{reached}, {share(theory[0])} by theory")
    print(
        f"halves with a recall at the bound or above: {share(found[:, 5] >= found[:, 6])}, {share(theory[1])} by theory"
    )


def share(holds: Any) -> str:
    """A mean in percent."""
    return f"{100 * np.mean(holds):.0f} %"


if __name__ == "__main__":
    main()
