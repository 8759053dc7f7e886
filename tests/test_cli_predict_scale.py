"""`flashtask predict` on many images: tables and shards, part files, jobs side by side, rows for bad images."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import polars
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_trees import write_image

from flashtask import ImageClassificationData, ImageClassifier
from flashtask.cli import finished_rows, run
from flashtask.cli.shares import part_of
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer.run_folder import RunFolder

COUNT = 60
KILLS = 50
BAD = {0: "the file is empty", 17: "the file is empty", 41: "the file is empty"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = ImageClassifier("timm/test_resnet", labels=("a", "b", "c"), pretrained=False)
    made.preprocessing = Preprocessing(input_size=(3, 32, 32))
    torch.nn.init.normal_(made.head[0].weight, std=5)
    content = {"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams), **made.describe()}
    write_checkpoint(folder / "best.ckpt", content)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty images, of which three are empty files."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        path = write_image(folder / f"{number:02d}.png", (30, 40))
        if number in BAD:
            path.write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def rows(model, photos, tmp_path_factory):
    """The rows of all images."""
    return predicted(model, photos, tmp_path_factory.mktemp("rows") / "rows.jsonl")


def predicted(model, source, output, *options):
    """The rows that the command writes to a file of JSON lines, with a row for each bad image."""
    given = ["--on-bad-image", "row", "--output", str(output), *options]
    assert run(["predict", model, str(source), *given]) == 0
    return rows_in(output)


def rows_in(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def require_same(found, expected, *, paths=True):
    """The same rows in the same order; scores to 1e-5."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        score, its = one.get("score"), other.get("score")
        assert {**one, "score": 0, "path": 0} == {**other, "score": 0, "path": 0}
        assert score == its or score == pytest.approx(its, abs=1e-5)
        assert not paths or one["path"] == other["path"]


# ---- rows


def test_an_image_that_cannot_be_read_is_a_row_with_the_reason(rows, photos):
    assert [row["path"] for row in rows] == [str(photos / f"{number:02d}.png") for number in range(COUNT)]
    assert {place: row["error"] for place, row in enumerate(rows) if row["error"]} == BAD
    assert all(set(row) == ({"path", "error"} if row["error"] else {"path", "label", "score", "error"}) for row in rows)


def test_parquet_has_a_type_for_each_column_and_null_where_there_is_nothing(model, photos, rows, tmp_path):
    output = tmp_path / "rows.parquet"
    assert run(["predict", model, str(photos), "--output", str(output), "--top-k", "2"]) == 0
    schema = pyarrow.parquet.read_schema(output)
    assert [str(schema.field(name).type) for name in schema.names] == [
        *("string", "string", "double"),
        *("list<element: string>", "list<element: double>", "string"),
    ]
    found = polars.read_parquet(output)
    assert found["labels"].list.len().drop_nulls().unique().to_list() == [2]
    plain = [{name: value for name, value in row.items() if value is not None} for row in rows]
    own = found.select("path", "label", "score", "error").to_dicts()
    require_same([{k: v for k, v in row.items() if v is not None} for row in own], plain)


def test_columns_of_csv_are_those_of_the_first_image_that_could_be_read(model, photos, rows, tmp_path, capsys):
    assert run(["predict", model, str(photos), "--on-bad-image", "row", "--format", "csv"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert list(lines[0]) == ["path", "label", "score", "error"]
    assert [line["error"] for line in lines] == [row["error"] or "" for row in rows]
    assert [line["label"] for line in lines] == [row.get("label", "") for row in rows]


def test_a_table_shows_the_reason_in_place_of_a_label(model, photos, capsys):
    images = [str(photos / name) for name in ("00.png", "01.png", "17.png")]
    assert run(["predict", model, *images, "--on-bad-image", "row"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["path", *images]
    assert [lines[1][1], lines[3][1]] == ["the file is empty"] * 2


@pytest.mark.long
def test_processes_that_load_pass_bad_images_on(model, photos, rows, tmp_path):
    require_same(predicted(model, photos, tmp_path / "rows.jsonl", "--num-workers", "2"), rows)


def test_nothing_but_bad_images_is_a_file_with_their_reasons(model, photos, tmp_path):
    output = tmp_path / "rows.parquet"
    assert run(["predict", model, str(photos / "00.png"), "--output", str(output)]) == 0
    assert polars.read_parquet(output).to_dicts() == [{"path": str(photos / "00.png"), "error": BAD[0]}]


# ---- tables and shards


def test_a_column_of_a_table_is_predicted_row_for_row(model, photos, rows, tmp_path):
    names = [f"{number:02d}.png" for number in range(20)]
    table = tmp_path / "cells.csv"
    table.write_text("n,file,other\n" + "".join(f"{n},{name},{name}\n" for n, name in enumerate(names)) + "20,,x.png\n")
    found = predicted(model, table, tmp_path / "rows.jsonl", "--input", "file", "--root", str(photos))
    require_same(found[:20], rows[:20])
    assert found[20]["error"]
    assert run(["predict", model, str(table)]) == 2  # which of two columns?
    assert run(["predict", model, str(table), str(photos)]) == 2


def test_pictures_inside_of_parquet_are_predicted(model, photos, rows, tmp_path):
    pictures = [(photos / f"{number:02d}.png").read_bytes() or b"no picture" for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures}), tmp_path / "cells.parquet")
    found = predicted(model, tmp_path / "cells.parquet", tmp_path / "rows.jsonl")
    assert [row["path"] for row in found] == [f"cells.parquet[{number}]" for number in range(10)]
    require_same(found[1:], rows[1:10], paths=False)
    assert found[0]["error"] == "not an image of a known format"


def test_a_table_in_a_store_names_images_beside_it(model, photos, rows, tmp_path):
    store = fsspec.filesystem("memory")
    for number in range(1, 5):
        store.pipe(f"/bucket/photos/{number}.png", (photos / f"{number:02d}.png").read_bytes())
    store.pipe("/bucket/all.csv", b"file\n" + b"".join(b"photos/%d.png\n" % number for number in (1, 2, 9, 3, 4)))
    found = predicted(model, "memory://bucket/all.csv", tmp_path / "rows.jsonl")
    assert found.pop(2) == {"path": "memory://bucket/photos/9.png", "error": "the file does not exist"}
    require_same(found, rows[1:5], paths=False)
    assert found[0]["path"] == "memory://bucket/photos/1.png"


def test_shards_are_predicted_in_the_order_of_their_list(model, photos, rows, tmp_path):
    good = [number for number in range(12) if number not in BAD]
    table = tmp_path / "cells.csv"
    table.write_text("file,kind\n" + "".join(f"{photos}/{number:02d}.png,{'ab'[number % 2]}\n" for number in good))
    data = ImageClassificationData.from_csv("file", "kind", str(table), val_split=3, split_seed=1)
    folder = data.save_shards(tmp_path / "shards")
    with (folder / "samples.csv").open(newline="") as file:
        order = [int(Path(row["name"]).stem) for row in csv.DictReader(file)]
    found = predicted(model, folder, tmp_path / "rows.jsonl")
    require_same(found, [rows[number] for number in order], paths=False)
    assert sorted(order) == good
    assert all(".tar#" in row["path"] for row in found)


# ---- jobs


@pytest.mark.parametrize("jobs", [1, 7])
def test_shards_of_a_job_are_stretches_that_make_up_the_whole(jobs, photos, model, rows, tmp_path):
    found = []
    for number in range(1, jobs + 1):
        given = ["--on-bad-image", "row", "--output", str(tmp_path / "rows.jsonl"), "--shard", f"{number}/{jobs}"]
        assert run(["predict", model, str(photos), *given]) == 0
        found += rows_in(tmp_path / f"rows-{number:05d}-of-{jobs:05d}.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
    require_same(found, rows)


def test_every_image_is_in_one_shard_however_many_there_are():
    for count in (0, 1, 5, 60, 1001):
        for jobs in (1, 2, 16, 64):
            parts = [range(count)[part_of(count, f"{number}/{jobs}")] for number in range(1, jobs + 1)]
            assert [position for part in parts for position in part] == [*range(count)]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.long
@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_job_killed_fifty_times_has_no_lost_and_no_doubled_row(ending, model, photos, tmp_path):
    output = tmp_path / f"rows.{ending}"
    script = Path(__file__).with_name("predict_and_kill.py")
    table = tmp_path / "many.csv"
    table.write_text("file\n" + "".join(f"{photos}/{number % COUNT:02d}.png\n" for number in range(12 * COUNT)))
    given = ["predict", model, str(table), "--on-bad-image", "row", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script), str(KILLS), "7", *given], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    killed, ended, *moments = map(int, done.stdout.split())
    assert killed == KILLS
    assert sum(number > 3 for number in moments) > KILLS // 2  # there were parts to continue from
    assert len(set(moments)) > KILLS // 4
    whole = _table_of(f"{output}.0")
    assert len(whole) == 12 * COUNT
    for number in range(1, ended + 1):
        require_same(_table_of(f"{output}.{number}"), whole)
    assert not list(tmp_path.glob("*.parts"))


def _table_of(path):
    """The rows of a file, whatever its kind."""
    if ".jsonl" in path:
        return rows_in(path)
    if ".parquet" in path:
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, "score": float(row["score"] or 0)} for row in rows]


@pytest.fixture
def stopped(model, photos, tmp_path, monkeypatch):
    """The command of a job that has ten rows in parts, its output, and the rows of the whole."""
    monkeypatch.setattr(finished_rows, "_IMAGES", 5)
    output, pictures = tmp_path / "rows.jsonl", tmp_path / "pictures"
    command = ["predict", model, str(photos), "--on-bad-image", "row", "--output", str(output)]
    assert run(command) == 0
    lines = rows_in(output)
    output.unlink()
    in_the_way = pictures / "12.png"
    in_the_way.mkdir(parents=True)
    command += ["--draw", str(pictures)]
    assert run(command) == 74
    in_the_way.rmdir()
    assert sorted(os.listdir(f"{output}.parts")) == [
        *("job.json", "rows-000000000000-000000000005.jsonl", "rows-000000000005-000000000010.jsonl")
    ]
    return command, output, lines


def test_a_job_that_could_not_write_is_continued_by_the_same_command(stopped, capsys):
    command, output, lines = stopped
    assert not output.exists()
    assert run(command) == 0
    assert f"continuing after 10 of 60 images, from {output}.parts" in capsys.readouterr().err
    require_same(rows_in(output), lines)
    assert sorted(os.listdir(output.parent)) == ["pictures", output.name]
    assert len(os.listdir(output.parent / "pictures")) == COUNT - len(BAD)


def test_rows_of_another_job_are_not_mixed(stopped, tmp_path, capsys):
    command, output, _ = stopped
    for more, differs in ((["--scores", "all"], "the columns"), (["--value-range", "0,200"], "the preprocessing")):
        assert run([*command, *more]) == 73
        told = capsys.readouterr().err
        assert f"what differs: {differs}\n" in told
        assert f"rm -r {output}.parts" in told
    images = command.index("--on-bad-image")
    assert run([*command[: images - 1], command[images - 1] + "/01.png", *command[images:]]) == 73
    assert "what differs: the images" in capsys.readouterr().err


def test_two_processes_do_not_work_on_one_job(stopped, capsys):
    command, output, lines = stopped
    folder = RunFolder(Path(f"{output}.parts"), resume=True)
    assert run(command) == 73
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    folder.release()
    assert run(command) == 0
    require_same(rows_in(output), lines)


def test_a_part_that_is_gone_is_predicted_again_with_all_that_follow(stopped):
    command, output, lines = stopped
    Path(f"{output}.parts", "rows-000000000000-000000000005.jsonl").unlink()
    assert run(command) == 0
    require_same(rows_in(output), lines)


def test_a_damaged_part_is_refused(stopped, capsys):
    command, output, _ = stopped
    Path(f"{output}.parts", "rows-000000000005-000000000010.jsonl").write_bytes(b'{"path": "x"\0\n')
    assert run(command) == 76
    assert "is damaged" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.long
def test_two_processes_continue_a_job_of_one(stopped, capfd):
    command, output, lines = stopped
    assert run([*command, "--accelerator", "cpu", "--devices", "2", "--distributed", "ddp_spawn"]) == 0
    require_same(rows_in(output), lines)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_two_actors_of_ray_continue_a_job_of_one_process(stopped, tmp_path):
    pytest.importorskip("ray")
    command, output, lines = stopped
    assert run([*command, "--engine", "ray", "--devices", "2"]) == 0
    require_same(rows_in(output), lines)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "ray", "--distributed", "ddp"], "leave out --distributed"),
        (["--engine", "ray", "--devices", "-1"], "--devices 4"),
        (["--format", "parquet"], "--output rows.parquet"),
        (["--shard", "0/4"], "must be from 1/N"),
        (["--input", "file"], "there is no table"),
        (["--format", "png", "--output", "x", "--on-bad-image", "row"], "files, not rows"),
        (["--format", "coco", "--output", "x", "--shard", "1/2"], "--shard divides rows"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, told, model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["predict", model, str(photos), *options]) == 2
    assert told in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


MEASURED = """
import resource, sys
from flashtask.cli import finished_rows, run
from flashtask.cli.shares import part_of
finished_rows._IMAGES = 500
assert run(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(model, photos, tmp_path):
    peaks = []
    for count in (1000, 8000):
        table = tmp_path / f"{count}.csv"
        table.write_text("file\n" + "".join(f"{photos}/{number % COUNT:02d}.png\n" for number in range(count)))
        command = ["predict", model, str(table), "--output", str(tmp_path / f"{count}.parquet")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
        assert pyarrow.parquet.read_metadata(tmp_path / f"{count}.parquet").num_rows == count
    assert peaks[1] - peaks[0] < 25, peaks  # MB
