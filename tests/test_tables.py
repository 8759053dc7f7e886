"""Samples in tables: which columns are read, what their targets mean, and how they are split."""

from __future__ import annotations

import copy
import io
import pickle
import tracemalloc

import numpy as np
import pytest
from image_trees import write_image
from PIL import Image

from flashtask import ImageClassificationData, ImageRegressionData
from flashtask.core.errors import BadDataError, IntegrityError, MissingInputError, UsageError
from flashtask.data import tables
from flashtask.data.samples import SampleTable, as_text
from flashtask.data.splits import grouped_split
from flashtask.data.tables import open_table
from flashtask.data.targets import LabelReader, LabelsReader, NumberReader, Source

SOURCE = Source("train_file", "cells.csv", against="train_file")


@pytest.fixture
def folder(tmp_path):
    """Twelve images and `cells.csv` beside them."""
    lines = ["file,kind,size,round,red,site,part"]
    for number in range(12):
        write_image(tmp_path / "images" / f"{number:02}.png")
        part = "val" if number % 4 == 3 else "train"
        lines.append(
            f"images/{number:02}.png,{'ab'[number % 2]},{number / 2},{number % 2},{number % 3},s{number // 3},{part}"
        )
    text = "\n".join(line.replace(",2,s", ",1,s") for line in lines) + "\n"
    (tmp_path / "cells.csv").write_text(text)
    return tmp_path


def batches(data, part="train"):
    data.setup("fit")
    return list(getattr(data, f"{part}_dataloader")())


# ---- columns


def test_the_column_of_the_images_is_found_and_targets_are_named(folder):
    data = ImageClassificationData.from_csv(target_fields="kind", train_file=folder / "cells.csv", val_split=0.25)
    assert data.labels == ("a", "b")
    assert data.sizes() == {"train": 9, "val": 3} or data.sizes() == {"train": 8, "val": 4}
    assert data.describe_targets() == "2 classes, from the column 'kind'"
    arguments = data.recipe()["from_csv"]
    assert (arguments["input_field"], arguments["target_fields"]) == ("file", ["kind"])
    again = ImageClassificationData.from_csv(**arguments)
    assert again.split_manifest() == data.split_manifest()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_and_a_byte_order_mark_are_recognised(folder, delimiter):
    text = (folder / "cells.csv").read_text().replace(",", delimiter)
    (folder / "other.csv").write_text("\ufeff" + text, encoding="utf-8")
    data = ImageRegressionData.from_csv("file", "size", train_file=folder / "other.csv")
    targets = np.concatenate([batch[1].numpy() for batch in batches(data)])
    assert sorted(targets[:, 0].tolist()) == [number / 2 for number in range(12)]


@pytest.mark.long
def test_paths_count_from_the_table_or_from_a_root(folder, tmp_path):
    (folder / "tables").mkdir()
    (folder / "tables" / "cells.csv").write_text((folder / "cells.csv").read_text())
    inside = ImageClassificationData.from_csv(
        "file", "kind", train_file=folder / "tables" / "cells.csv", images_root=folder
    )
    assert len(batches(inside)[0][1]) == 12
    with pytest.raises(BadDataError, match="the file does not exist"):
        batches(ImageClassificationData.from_csv("file", "kind", train_file=folder / "tables" / "cells.csv"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"which column holds the targets\? There are: 'file', 'kind'"),
        ({"target_fields": "kinds"}, r"has no column 'kinds'.*\n.*did you mean 'kind'"),
        ({"input_field": "fiel", "target_fields": "kind"}, r"has no column 'fiel'"),
        ({"target_fields": "kind", "split_field": "site"}, "column 'site' has 's.', which is not a part of the data"),
        ({"target_fields": ["kind", "size"], "label_separator": ","}, "contradict each other"),
    ],
)
def test_columns_that_are_not_clear_are_refused(folder, arguments, words):
    with pytest.raises((UsageError, BadDataError)) as caught:
        ImageClassificationData.from_csv(train_file=folder / "cells.csv", **arguments)
    assert caught.match(f"(?s){words}")


def test_files_that_are_not_tables_are_refused(folder):
    for text, words in (
        ("", "is empty"),
        ("file,kind\n", "has a header and no rows"),
        ("file,file\na.png,b\n", "two columns 'file'"),
        ("file,kind\na.png\n", "line 2 has 1 cells, and the header has 2"),
    ):
        (folder / "bad.csv").write_text(text)
        with pytest.raises(BadDataError, match=words):
            ImageClassificationData.from_csv("file", "kind", train_file=folder / "bad.csv")
    (folder / "bad.csv").write_bytes(b"file,kind\n\xff\xfe.png,a\n")
    with pytest.raises(BadDataError, match="not a table in UTF-8"):
        ImageClassificationData.from_csv("file", "kind", train_file=folder / "bad.csv")
    with pytest.raises(MissingInputError):
        ImageClassificationData.from_csv("file", "kind", train_file=folder / "none.csv")
    with pytest.raises(UsageError, match="needs a file"):
        ImageClassificationData.from_csv("file", "kind")
    with pytest.raises(UsageError, match="are the same file"):
        ImageClassificationData.from_csv("file", "kind", train_file=folder / "cells.csv", val_file=folder / "cells.csv")


# ---- parts and splits


def test_a_column_may_name_the_parts(folder):
    data = ImageClassificationData.from_csv("file", "kind", train_file=folder / "cells.csv", split_field="part")
    assert data.sizes() == {"train": 9, "val": 3}


def test_groups_are_not_split(folder):
    data = ImageClassificationData.from_csv(
        "file", "kind", train_file=folder / "cells.csv", val_split=0.25, group_field="site"
    )
    sites = {f"images/{number:02}.png": number // 3 for number in range(12)}
    val = {sites[name] for name in data.split_manifest()}
    assert len(data.split_manifest()) == 3
    assert len(val) == 1


def test_grouped_splits_depend_on_the_seed_and_come_near_the_share():
    groups = [f"g{number % 17}" for number in range(170)]
    chosen = {tuple(grouped_split(groups, 0.2, seed)) for seed in range(20)}
    assert len(chosen) > 5
    for rows in chosen:
        assert 20 <= len(rows) <= 40
        assert not {groups[i] for i in rows} & {groups[i] for i in range(170) if i not in rows}
    with pytest.raises(BadDataError, match="all samples are of one group"):
        grouped_split(["a"] * 5, 0.2)


def test_a_resume_is_refused_where_a_target_has_changed(folder):
    data = ImageRegressionData.from_csv("file", "size", train_file=folder / "cells.csv", val_split=0.25)
    state = data.state_dict()
    data.load_state_dict(state)
    text = (folder / "cells.csv").read_text()
    (folder / "cells.csv").write_text(text.replace(",0.5,", ",0.75,"))
    with pytest.raises(BadDataError, match="not those that the run was started on"):
        ImageRegressionData.from_csv("file", "size", train_file=folder / "cells.csv", val_split=0.25).load_state_dict(
            state
        )


# ---- readers


def test_labels_of_other_data_are_read_by_name(folder):
    reader = LabelReader(("kind",)).learned(as_text(["b", "a", "b"]), SOURCE)
    assert reader.labels == ("a", "b")
    assert reader.read(as_text(["b", "b", "a"]), SOURCE).tolist() == [1, 1, 0]
    with pytest.raises(BadDataError, match="1 label\\(s\\) unknown to train_file"):
        reader.read(as_text(["c"]), SOURCE)
    with pytest.raises(BadDataError, match="sample 2 has no label"):
        LabelReader(("kind",)).learned(as_text(["a", ""]), SOURCE)
    with pytest.raises(BadDataError, match="one class only: 'a'"):
        LabelReader(("kind",)).learned(as_text(["a", "a"]), SOURCE)


def test_several_labels_are_columns_of_flags_or_names_in_one():
    flags = as_text(["1", "0", "true", "no", "", "yes"]).reshape(3, 2)
    reader = LabelsReader(("x", "y")).learned(flags, SOURCE)
    assert reader.labels == ("x", "y")
    assert reader.read(flags, SOURCE).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert LabelsReader(("y", "x"), ("x", "y")).read(flags, SOURCE).tolist() == [[0, 1], [0, 1], [1, 0]]
    with pytest.raises(BadDataError, match="sample 1 has '2' in column 'x'"):
        reader.read(as_text(["2", "0"]).reshape(1, 2), SOURCE)
    named = LabelsReader(("tags",), separator="|").learned(as_text(["b| a", "", "c"]), SOURCE)
    assert named.labels == ("a", "b", "c")
    assert named.read(as_text(["c|a", ""]), SOURCE).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_numbers_have_a_scale_and_must_be_numbers():
    raw = as_text(["1", "3", "5"])
    reader = NumberReader(("size",)).learned(raw, SOURCE)
    assert (reader.mean, reader.std) == ((3.0,), (pytest.approx(np.std([1, 3, 5])),))
    assert reader.read(raw, SOURCE).tolist() == [[1], [3], [5]]
    assert reader.read(raw, SOURCE).dtype == np.float32
    assert NumberReader().learned(as_text(["2", "2"]), SOURCE).std == (1.0,)
    for wrong in ("", "much", "nan", "inf"):
        with pytest.raises(BadDataError, match=f"sample 2 has '{wrong}' in column 'size', which is not a number"):
            reader.read(as_text(["1", wrong]), SOURCE)


@pytest.mark.parametrize(
    "reader",
    [
        LabelReader(("k",), ("a", "b")),
        LabelsReader(("t",), ("a", "b"), "|"),
        NumberReader(("x", "y"), (0.0, 1.0), (1.0, 2.0)),
    ],
)
def test_readers_are_stored_as_plain_values(reader):
    assert type(reader).from_dict(reader.to_dict()) == reader


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LabelReader, {"labels": [1, 2]}),
        (LabelReader, {"labels": "ab"}),
        (LabelReader, {"code": "x"}),
        (LabelsReader, {"separator": 3}),
        (NumberReader, {"mean": [0.0], "std": []}),
        (NumberReader, {"mean": [0.0], "std": [0.0]}),
        (NumberReader, {"mean": ["x"], "std": [1.0]}),
        (NumberReader, {"mean": [float("nan")], "std": [1.0]}),
    ],
)
def test_a_description_of_targets_that_is_wrong_is_refused(kind, values):
    with pytest.raises(IntegrityError, match="description of the targets cannot be used"):
        kind.from_dict(values)


# ---- the table


def test_a_table_keeps_rows_together():
    left = SampleTable.of_part("train", ["/r/a.png", "/r/b.png"], as_text(["x", "y"]), root="/r")
    right = SampleTable.of_part("predict", ["/s/c.png"], root="/s")
    table = SampleTable.joined([left, right])
    assert table.names() == ["a.png", "b.png", "c.png"]
    assert table.of("train").targets.tolist() == ["x", "y"]
    moved = table.with_part(np.array([1]), "val")
    assert [len(moved.of(part)) for part in ("train", "val", "predict")] == [1, 1, 1]
    assert moved.names() == table.names()
    assert moved.at(np.array([False, True, False])).targets.tolist() == ["y"]
    again = pickle.loads(pickle.dumps(moved))  # noqa: S301 - written in this line
    assert again.inputs.tolist() == moved.inputs.tolist()
    assert not table.has("test")
    assert len(table.of("test")) == 0


def test_names_that_are_not_utf8_have_a_place_too():
    odd = b"/r/\xff.png".decode("utf-8", "surrogateescape")
    table = SampleTable.joined([SampleTable.of_part("train", ["/r/a.png"]), SampleTable.of_part("val", [odd])])
    assert table.of("val").inputs.tolist() == [odd]


def test_ten_thousand_rows_take_little_memory():
    table = SampleTable.of_part("train", (f"/data/images/{number:09}.png" for number in range(10_000)))
    assert len(pickle.dumps(table)) < 10_000 * 100


@pytest.fixture
def heavy(tmp_path, monkeypatch):
    """Two Parquet files with 30 pictures of 300 kB each, in groups of 10 rows; the third row has none."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    contents: list[bytes | None] = []
    for number in range(2):
        cells = []
        for _ in range(30):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (320, 320, 3), dtype=np.uint8)).save(buffer, "PNG", compress_level=0)
            cells.append({"bytes": buffer.getvalue(), "path": "1.png"})
        cells[2] = {"bytes": None, "path": None} if number == 0 else cells[2]
        contents += [cell["bytes"] for cell in cells]
        parquet.write_table(
            pyarrow.table({"image": cells, "label": [0, 1] * 15}), tmp_path / f"{number}.parquet", row_group_size=10
        )
    return (tmp_path / "0.parquet", tmp_path / "1.parquet"), contents


@pytest.mark.parametrize("library", ["pyarrow", "polars"])
def test_pictures_of_parquet_files_are_not_held_in_memory(heavy, library, monkeypatch, tmp_path):
    pytest.importorskip(library)
    paths, contents = heavy
    monkeypatch.setattr(tables, "find_spec", lambda name: name == library)
    tracemalloc.start()
    try:
        pictures = open_table(paths, "train_file").pictures("image")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 300_000  # less than one of them
    assert len(pictures) == 60
    assert [pictures[row] for row in (59, 0, 2, 30, 29)] == [contents[row] for row in (59, 0, 2, 30, 29)]
    assert pictures[28:31] == contents[28:31]
    with pytest.raises(IndexError):
        pictures[60]
    again = open_table(paths, "train_file").pictures("image")
    assert again[59] == contents[59]
    assert copy.deepcopy(again)[31] == contents[31]
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 2  # and nothing unfinished beside them


def test_a_row_without_its_picture_is_named(heavy):
    paths, _ = heavy
    data = ImageClassificationData.from_csv("image", "label", train_file=paths[0], val_split=10)
    assert data.sizes() == {"train": 20, "val": 10}
    with pytest.raises(BadDataError, match=r"(?s)1 of 30 images.*train_file\[2\]': not an image: NoneType"):
        data.setup("fit")
