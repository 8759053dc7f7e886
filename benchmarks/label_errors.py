"""How many of the first suspected label errors are labels that were changed on purpose: ELPV with 5 % flipped.

    python benchmarks/label_errors.py FOLDER

FOLDER gets the photographs (scripts/lay_out_elpv.py) and one table a seed. The real backbone is EfficientNet-Lite0 with
the weights of its package; features are computed once, about a minute on two cores.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from flashtask import ImageClassificationData, ImageEmbedder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from lay_out_elpv import lay_out

SHARE, BACKBONE, CLASSES = 0.05, "efficientnet_lite0", ("functional", "defective")


def flipped_table(folder: Path, seed: int) -> tuple[Path, set[str]]:
    """A table of all photographs with some labels flipped, and the names of those."""
    files = sorted(folder.glob("*/*.png"))
    rng = np.random.default_rng(seed)
    flipped = set(rng.choice(len(files), round(SHARE * len(files)), replace=False).tolist())
    table = folder / f"flipped{seed}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label"))
        for row, image in enumerate(files):
            label = CLASSES.index(image.parent.name)
            writer.writerow((image.relative_to(folder), CLASSES[1 - label if row in flipped else label]))
    return table, {str(files[row]) for row in flipped}


def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    lay_out(folder)
    model = ImageEmbedder(BACKBONE)
    for seed in range(arguments.seeds):
        table, flipped = flipped_table(folder, seed)
        found = ImageClassificationData.from_csv("file", "label", train_file=table, val_split=0.2).audit(model)
        hits = [finding.samples[0].path in flipped for finding in found.by_kind.get("label", ())]
        first = ", ".join(f"{100 * np.mean(hits[:most]):.0f} % of the first {most}" for most in (20, 50, 100))
        share = 100 * sum(hits) / len(flipped)
        print(f"seed {seed}: {len(flipped)} flipped; {first}; {len(hits)} suspected, with {share:.0f} % of all flipped")
        print("  " + ", ".join(f"{kind} {len(own)}" for kind, own in found.by_kind.items()), flush=True)


if __name__ == "__main__":
    main()
