"""The examples of docs/data.md that make data run as they are written."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from image_trees import write_image, write_tree

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if "ImageClassificationData" in block],
    ids=lambda block: re.findall(r"\.(from_\w+)", block)[0],
)
def test_an_example_makes_training_data(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ["data/train", "data/val", "data/test", *(["photos"] if "from_folders" in block else [])]
    for folder in folders:
        write_tree(tmp_path / folder, {"cat": 5, "dog": 5})
    rows = [(f"photos/{kind}_{number}.png", kind, f"s{number // 2}") for number in range(10) for kind in ("cat", "dog")]
    if "from_folders" not in block:
        for file, _, _ in rows:
            write_image(Path(file))
    with Path("plants.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("file", "species", "site"), *rows])
    names: dict[str, object] = {}
    exec(block, names)
    sizes = names["data"].sizes()
    assert sizes["train"] >= 1
    assert ("val" in sizes) == ("val_" in block.split("data = ")[-1])
