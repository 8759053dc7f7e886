"""Whether the images that `flashtask learning-curve` proposes are worth more labels than random ones.

    python benchmarks/next_labels.py FOLDER [--start 50] [--count 100] [--repeats 20]

FOLDER holds a folder per class. A fifth validates. Of the others some are labelled at random, with the shares of the
classes; then as many again as `--count` says are labelled, chosen by `LearningCurve.next_labels`' rule, by the smallest
margin between the two best scores, or at random. Accuracy of the ridge head on the features of EfficientNet-Lite0.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from flashtask import ImageClassificationData, ImageEmbedder
from flashtask.tasks.learning_curve import _diverse, _of_part, _solved, _stratified


def main() -> None:
    """Print a line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", type=int, default=50)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    model = ImageEmbedder("efficientnet_lite0")
    data = ImageClassificationData.from_folders(given.folder, val_split=0.2)
    data.use_preprocessing(model.preprocessing)
    data.setup("fit")
    (features, targets), (val_features, val_targets) = (
        _of_part(model, data, part, data.labels) for part in ("train", "val")
    )
    found: dict[str, list[float]] = {}
    for repeat in range(given.repeats):
        random = np.random.default_rng(repeat)
        own = _stratified(targets, given.start, random)
        rest = np.setdiff1d(np.arange(len(targets)), own)
        head = _solved(features[own], targets[own], len(data.labels))
        with torch.no_grad():
            scores = head(torch.from_numpy(features[rest])).double().softmax(dim=1).numpy()
        best = np.sort(scores, axis=1)
        chosen = {
            "none": [],
            "random": random.permutation(len(rest))[: given.count],
            "smallest margin": np.argsort(best[:, -1] - best[:, -2])[: given.count],
            "uncertain and different": _diverse(scores, features[rest], given.count, random),
        }
        for name, rows in chosen.items():
            labelled = np.concatenate([own, rest[np.asarray(rows, dtype=int)]])
            solved = _solved(features[labelled], targets[labelled], len(data.labels))
            with torch.no_grad():
                said = solved(torch.from_numpy(val_features)).argmax(dim=1).numpy()
            found.setdefault(name, []).append(float((said == val_targets).mean()))
    print(f"{given.start} labels, {given.count} more, {given.repeats} repeats, {len(val_targets)} images to validate")
    for name, accuracies in found.items():
        print(f"{name}: {statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}")


if __name__ == "__main__":
    main()
