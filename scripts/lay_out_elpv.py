"""Lay out the ELPV photographs of solar cells as class folders: `functional` (probability below 0.5), `defective`.

The images come from the pip package `elpv-dataset` (CC BY-NC-SA 4.0) and are copied, never changed.
Source: Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence images,
Solar Energy 185 (2019).
"""

from __future__ import annotations

import argparse
import csv
import shutil
from importlib.metadata import files
from pathlib import Path


def rows() -> list[tuple[Path, float]]:
    """Every image of the package with its probability of a defect."""
    table = next(f for f in files("elpv-dataset") or [] if f.name == "labels.csv").locate()
    with Path(str(table)).open(newline="") as file:
        lines = [next(csv.reader([line], delimiter=" ", skipinitialspace=True)) for line in file if line.strip()]
    return [(Path(str(table)).parent / name, float(probability)) for name, probability, *_ in lines]


def lay_out(folder: Path, most: int | None = None) -> int:
    """Copy the images into `folder/functional` and `folder/defective`; what is there already stays."""
    chosen = rows()
    if most is not None and most < len(chosen):
        # Evenly over the table, so that all modules and both cell types of the data set take part.
        chosen = [chosen[len(chosen) * number // most] for number in range(most)]
    for source, probability in chosen:
        target = folder / ("functional" if probability < 0.5 else "defective") / source.name
        # The size tells a copy that was interrupted.
        if not target.exists() or target.stat().st_size != source.stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return len(chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, help="how many images; all 2,624 if not given")
    arguments = parser.parse_args()
    print(f"{lay_out(arguments.folder, arguments.most)} images in {arguments.folder}")
