"""The same table through every constructor: the same samples, the same targets, and the same trained weights."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import digest
from torch.utils.data import Dataset, Subset

from flashtask import (
    DataModule,
    ImageClassificationData,
    ImageClassifier,
    ImageRegressionData,
    ImageRegressor,
    Preprocessing,
    Trainer,
    seed_everything,
)

NAMES = ("blue", "red")
SIZE = 20


def made(folder):
    """Twelve pictures, the last four to validate on, with a label, a set of labels and a number each."""
    generator = np.random.default_rng(3)
    rows = []
    for number in range(12):
        kind = number % 2
        pixels = generator.integers(0, 90, (SIZE, SIZE, 3))
        pixels[..., 2 * (1 - kind)] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{NAMES[kind]}_{number:02}.png")
        tags = [name for name, on in (("dark", number % 3 == 0), ("large", number % 4 < 2)) if on] or ["none"]
        part = "val" if number >= 8 else "train"
        rows.append((f"{NAMES[kind]}_{number:02}.png", NAMES[kind], ";".join(tags), 0.25 * number, part))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def rows(folder):
    return made(folder)


class Kind:
    """What differs between one label, several labels and a number."""

    def __init__(self, data, column, options, model):
        self.data, self.column, self.options, self.model = data, column, options, model

    def of(self, row):
        return row[self.column]


KINDS = {
    "label": Kind(ImageClassificationData, 1, {}, lambda **o: ImageClassifier(**o)),
    "labels": Kind(
        ImageClassificationData, 2, {"label_separator": ";"}, lambda **o: ImageClassifier(multi_label=True, **o)
    ),
    "number": Kind(ImageRegressionData, 3, {}, lambda **o: ImageRegressor(**o)),
}
FIELDS = ("file", "label", "labels", "number", "part")
COMMON = {"batch_size": 4, "preprocessing": Preprocessing(input_size=16, crop_pct=1.0), "augment": "none"}


def parts_of(rows):
    return [row for row in rows if row[4] == "train"], [row for row in rows if row[4] == "val"]


def by_files(kind, folder, rows):
    train, val = parts_of(rows)
    return kind.data.from_files(
        [folder / row[0] for row in train],
        [kind.of(row) for row in train],
        [folder / row[0] for row in val],
        [kind.of(row) for row in val],
        **kind.options,
        **COMMON,
    )


def by_csv(kind, folder, rows):
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])
    field = FIELDS[kind.column]
    return kind.data.from_csv("file", field, folder / "table.csv", split_field="part", **kind.options, **COMMON)


def by_json_lines(kind, folder, rows):
    lines = [json.dumps(dict(zip(FIELDS, row, strict=True))) for row in rows]
    (folder / "table.jsonl").write_text("\n".join(lines) + "\n")
    field = FIELDS[kind.column]
    return kind.data.from_csv("file", field, folder / "table.jsonl", split_field="part", **kind.options, **COMMON)


def by_parquet(kind, folder, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = dict(zip(FIELDS, zip(*rows, strict=True), strict=True))
    parquet.write_table(
        pyarrow.table({name: list(column) for name, column in columns.items()}), folder / "table.parquet"
    )
    field = FIELDS[kind.column]
    return kind.data.from_csv("file", field, folder / "table.parquet", split_field="part", **kind.options, **COMMON)


def by_frame(make):
    def build(kind, folder, rows):
        columns = {name: list(column) for name, column in zip(FIELDS, zip(*rows, strict=True), strict=True)}
        return kind.data.from_data_frame(
            "file",
            FIELDS[kind.column],
            make(columns),
            images_root=folder,
            split_field="part",
            **kind.options,
            **COMMON,
        )

    return build


def by_pandas(kind, folder, rows):
    return by_frame(pytest.importorskip("pandas").DataFrame)(kind, folder, rows)


def by_polars(kind, folder, rows):
    return by_frame(pytest.importorskip("polars").DataFrame)(kind, folder, rows)


def pixels_of(folder, rows):
    return np.stack([np.array(Image.open(folder / row[0])) for row in rows])


def in_memory(name, make):
    def build(kind, folder, rows):
        train, val = parts_of(rows)
        return getattr(kind.data, name)(
            make(folder, train),
            [kind.of(row) for row in train],
            make(folder, val),
            [kind.of(row) for row in val],
            **kind.options,
            **COMMON,
        )

    return build


class Pairs(Dataset):
    """A dataset of somebody else, which opens a picture in each item and says nothing of its targets."""

    def __init__(self, folder, rows, kind):
        self.folder, self.rows, self.kind = folder, rows, kind

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        with Image.open(self.folder / self.rows[place][0]) as image:
            return image.convert("RGB"), self.kind.of(self.rows[place])


class Records(Pairs):
    def __getitem__(self, place):
        image, target = super().__getitem__(place)
        return {"id": place, "image": image, "label": target}


def by_datasets(kind, folder, rows):
    train, val = parts_of(rows)
    return kind.data.from_datasets(Pairs(folder, train, kind), Records(folder, val, kind), **kind.options, **COMMON)


def by_subsets(kind, folder, rows):
    whole = Pairs(folder, rows, kind)
    train = Subset(whole, range(8))
    return kind.data.from_datasets(train, Subset(whole, [8, 9, 10, 11]), **kind.options, **COMMON)


def by_hugging_face(kind, folder, rows):
    datasets = pytest.importorskip("datasets")
    sets = []
    for part in parts_of(rows):
        columns = {"image": [str(folder / row[0]) for row in part], "label": [kind.of(row) for row in part]}
        sets.append(datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()))
    return kind.data.from_datasets(*sets, **kind.options, **COMMON)


def by_data_module(kind, folder, rows):
    class Own(DataModule):
        def setup(self, stage):
            self.sets = [Pairs(folder, part, kind) for part in parts_of(rows)]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.sets[0], shuffle=True, collate_fn=list)

        def val_dataloader(self):
            return torch.utils.data.DataLoader(self.sets[1], collate_fn=list)

    return kind.data.from_data_module(Own(), **kind.options, **COMMON)


CONSTRUCTORS = {
    "from_csv": by_csv,
    "json lines": by_json_lines,
    "parquet": by_parquet,
    "mapping": by_frame(dict),
    "pandas": by_pandas,
    "polars": by_polars,
    "from_numpy": in_memory("from_numpy", pixels_of),
    "list of arrays": in_memory("from_numpy", lambda folder, rows: list(pixels_of(folder, rows))),
    "from_tensors": in_memory(
        "from_tensors", lambda folder, rows: torch.from_numpy(pixels_of(folder, rows)).permute(0, 3, 1, 2)
    ),
    "from_images": in_memory("from_images", lambda folder, rows: [Image.open(folder / row[0]) for row in rows]),
    "bytes": in_memory("from_images", lambda folder, rows: [(folder / row[0]).read_bytes() for row in rows]),
    "from_datasets": by_datasets,
    "subsets": by_subsets,
    "hugging face": by_hugging_face,
    "from_data_module": by_data_module,
}


def samples_of(data):
    data.setup("fit")
    return [list(loader) for loader in (data.val_dataloader(), data.train_dataloader().dataset)]


def trained(kind, data, folder):
    seed_everything(5, verbose=False)
    model = kind.model(backbone="timm/test_resnet", pretrained=False, learning_rate=0.02)
    trainer = Trainer(max_epochs=1, output_dir=folder, enable_progress_bar=False, enable_model_summary=False, seed=5)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    return digest(model)


@pytest.fixture(scope="module")
def expected(folder, rows, tmp_path_factory):
    """What `from_files` gives, by kind of target: the samples, the labels, and the weights after an epoch."""
    found = {}
    for name, kind in KINDS.items():
        data = by_files(kind, folder, rows)
        found[name] = (
            samples_of(data),
            data.describe_targets(),
            trained(kind, by_files(kind, folder, rows), tmp_path_factory.mktemp(name)),
        )
    return found


def same(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_the_same_table_gives_the_same_samples_and_weights(constructor, name, folder, rows, expected, tmp_path):
    kind = KINDS[name]
    data = CONSTRUCTORS[constructor](kind, folder, rows)
    samples, described, weights = expected[name]
    assert same(samples_of(data), samples)
    assert data.sizes() == {"train": 8, "val": 4}
    assert data.describe_targets().partition(", from")[0] == described.partition(", from")[0]
    again = CONSTRUCTORS[constructor](kind, folder, rows)
    again.load_state_dict(data.state_dict())
    assert trained(kind, again, tmp_path / "run") == weights
