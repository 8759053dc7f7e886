"""`flashtask predict`: what it takes, the formats it writes, and names of files that are hard to write."""

from __future__ import annotations

import csv
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import threading

import pytest
import torch
from image_trees import write_image

import flashtask
from flashtask import ImageClassifier
from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.names import shown_name
from flashtask.core.preprocessing import Preprocessing

LABELS = ("b,c", "a", 'with "quotes"')
ODD = [
    b"line\nbreak.png",
    b"red\x1b[31m.png",
    b"caf\xe9.png",
    b'comma, "quote".png',
    b"return\r.png",
    "größe ok.png".encode(),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = ImageClassifier("timm/test_resnet", labels=LABELS, pretrained=False)
    made.preprocessing = Preprocessing(input_size=(3, 32, 32))
    torch.nn.init.normal_(made.head[0].weight, std=5)
    content = {"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams), **made.describe()}
    write_checkpoint(folder / "best.ckpt", content)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    """Three images, in a folder."""
    for name in ("a.png", "b.png", "below/c.png"):
        write_image(tmp_path / "photos" / name, (30, 40))
    return str(tmp_path / "photos")


def scores_of(model, path):
    """Of each label, by Python."""
    return flashtask.load(model).predict(path).probabilities


# ---- formats


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("how", "form"),
    [
        ("--format", "csv"),
        ("--output", "json"),
        ("--format", "jsonl"),
        *(pytest.param(how, form, marks=pytest.mark.long) for how, form in (("--output", "csv"), ("--format", "json"))),
        pytest.param("--output", "jsonl", marks=pytest.mark.long),
    ],
)
def test_scores_all_gives_the_score_of_every_label_in_the_models_order(form, how, model, photos, tmp_path, capsys):
    options = ["--format", form] if how == "--format" else ["--output", str(tmp_path / f"out.{form.upper()}")]
    assert run(["predict", model, photos, "--scores", "all", *options]) == 0
    text = capsys.readouterr().out if how == "--format" else (tmp_path / f"out.{form.upper()}").read_text()
    if form == "csv":
        header, *lines = csv.reader(io.StringIO(text))
        assert header == ["path", "label", "score", *(f"score_{label}" for label in LABELS)]
        rows = [dict(zip(header[:3], line, strict=False)) for line in lines]
        found = [dict(zip(LABELS, map(float, line[3:]), strict=True)) for line in lines]
    else:
        rows = json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]
        found = [row["scores"] for row in rows]
        assert [list(scores) for scores in found] == [list(LABELS)] * 3
    assert [os.path.basename(row["path"]) for row in rows] == ["a.png", "b.png", "c.png"]
    for row, scores in zip(rows, found, strict=True):
        assert scores == pytest.approx(scores_of(model, row["path"]), abs=1e-5)
        assert row["label"] == max(scores, key=scores.get)
        assert float(row["score"]) == max(scores.values())


@pytest.mark.long
def test_a_table_has_a_column_a_label_and_without_scores_all_nothing_is_added(model, photos, capsys):
    assert run(["predict", model, photos, "--scores", "all"]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split("score", 1)[1].split("  ")[-1].strip() == 'with "quotes"'
    scores = scores_of(model, first.split()[0])
    assert first.split()[-3:] == [f"{scores[label]:.4f}" for label in LABELS]
    assert run(["predict", model, photos, "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "path,label,score"
    assert run(["predict", model, photos, "--format", "jsonl", "--scores", "best"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[0])) == ["path", "label", "score"]
    assert run(["predict", model, photos, "--format", "json", "--top-k", "2"]) == 0
    assert [len(row["scores"]) for row in json.loads(capsys.readouterr().out)] == [2, 2, 2]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("name", "given", "starts"),
    [
        ("rows.csv", None, "path,label,score\n"),
        ("rows.json", None, "[\n{"),
        ("rows.jsonl", None, '{"path"'),
        ("rows.ndjson", None, '{"path"'),
        ("rows.txt", None, "path  "),
        ("rows", None, "path  "),
        ("rows.csv", "csv", "path,label"),
        ("rows.txt", "csv", "path,label"),
        ("rows.dat", "jsonl", '{"path"'),
    ],
)
def test_the_name_of_the_output_decides_its_format(name, given, starts, model, photos, tmp_path):
    options = ["--format", given] if given else []
    assert run(["predict", model, photos, "--output", str(tmp_path / name), *options]) == 0
    assert (tmp_path / name).read_text().startswith(starts)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--output", "rows.xlsx"], [".xlsx is not", ".csv, .json, .jsonl"]),
        (["--output", "rows.json", "--format", "csv"], ["contradict", "--format json, or --output rows.csv"]),
        (["--output", "rows.csv", "--format", "table"], ["contradict", "--format csv, or --output rows.txt"]),
        (["--scores", "all", "--top-k", "2"], ["contradict", "leave out --top-k"]),
        (["--scores", "al"], ["did you mean 'all'?"]),
        (["--format", "jsno"], ["did you mean 'json'"]),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_read(
    options, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(["predict", "no-model", "no-image", *options]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in told)
    assert os.listdir(tmp_path) == []


def test_an_empty_list_is_json_too(model, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert run(["predict", model, str(tmp_path), "--on-bad-image", "skip", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


# ---- inputs


def test_a_folder_says_what_it_passed_over_and_a_pattern_how_to_type_it(model, photos, tmp_path, capsys):
    for name in ("1.heic", "2.tga", "3.heic", "4.ico"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    assert run(["predict", model, photos, "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert f"passed over 4 of 7 files in {photos}, which are not images by their names: 2 .heic, 1 .tga, 1 .ico" in err
    assert run(["predict", model, f"{photos}/*.png"]) == 66
    assert "without quotation marks" in capsys.readouterr().err


@pytest.mark.long
def test_addresses_files_and_folders_are_predicted_in_their_order(model, photos, tmp_path, capsys):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=photos)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/b.png"
        missing = address.replace("b.png", "no.png")
        assert run(["predict", model, f"{photos}/a.png", address, f"{photos}/below", "--format", "csv"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["path"] for row in rows] == [f"{photos}/a.png", address, f"{photos}/below/c.png"]
        assert float(rows[1]["score"]) == pytest.approx(max(scores_of(model, f"{photos}/b.png").values()), abs=1e-5)
        assert run(["predict", model, f"{photos}/a.png", missing, "--output", str(tmp_path / "rows.csv")]) == 69
        assert "status 404" in capsys.readouterr().err
        assert not (tmp_path / "rows.csv").exists()
        options = ["--on-bad-image", "skip", "--format", "csv"]
        assert run(["predict", model, f"{photos}/a.png", missing, *options]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 2
        assert f"left out '{missing}'" in err
        assert "status 404" in err
        server.shutdown()


# ---- names


@pytest.fixture
def odd(tmp_path):
    """A folder of images whose names are hard to write."""
    first = write_image(tmp_path / "plain.png")
    (tmp_path / "odd").mkdir()
    for name in ODD:
        shutil.copy(first, os.path.join(os.fsencode(tmp_path), b"odd", name))
    return str(tmp_path / "odd")


def test_a_table_shows_names_on_one_line_each_as_the_shell_takes_them(odd, model, capsys):
    assert run(["predict", model, odd]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ODD) + 1
    assert all(line.isprintable() for line in lines)
    for name in sorted(ODD, key=os.fsdecode):
        path = os.path.join(odd, os.fsdecode(name))
        shown = shown_name(path)
        assert sum(line.startswith(f"{shown} ") for line in lines) == 1
        typed = shown if shown != path else f"'{path}'"
        told = subprocess.run(["bash", "-c", f"ls -d {typed} > /dev/null && printf %s {typed}"], capture_output=True)
        assert told.stdout == os.fsencode(path)


def test_csv_and_json_lead_back_to_every_file(odd, model, tmp_path, capfdbinary):
    expected = sorted(os.path.join(odd, os.fsdecode(name)) for name in ODD)
    for options in (["--format", "csv"], ["--output", str(tmp_path / "rows.csv")]):
        assert run(["predict", model, odd, *options]) == 0
        raw = capfdbinary.readouterr().out if options[0] == "--format" else (tmp_path / "rows.csv").read_bytes()
        text = io.StringIO(raw.decode("utf-8", "surrogateescape"), newline="")
        assert [row["path"] for row in csv.DictReader(text)] == expected
    assert run(["predict", model, odd, "--format", "jsonl"]) == 0
    found = [json.loads(line)["path"] for line in capfdbinary.readouterr().out.splitlines()]
    assert found == expected
    assert all(os.path.exists(path) for path in found)


def test_labels_of_a_hostile_checkpoint_do_not_act_in_the_terminal(photos, tmp_path, capsys):
    torch.manual_seed(0)
    made = ImageClassifier("timm/test_resnet", labels=("\x1b[2J", "new\nline"), pretrained=False)
    content = {"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams), **made.describe()}
    write_checkpoint(tmp_path / "hostile.ckpt", content)
    assert read_checkpoint(tmp_path / "hostile.ckpt")["labels"][0] == "\x1b[2J"
    assert run(["predict", str(tmp_path / "hostile.ckpt"), photos, "--scores", "all"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4
    assert all(line.isprintable() for line in out.splitlines())
    assert r"$'\x1b[2J'" in out


@pytest.mark.long
def test_a_bad_file_whose_name_is_not_utf8_is_named_so_that_it_is_found(odd, model, capsys):
    path = os.path.join(odd, os.fsdecode(b"caf\xe9.png"))
    with open(path, "wb"):
        pass
    assert run(["predict", model, odd]) == 65
    assert f"{shown_name(path)}: the file is empty" in capsys.readouterr().err
    assert run(["predict", model, odd, "--on-bad-image", "skip"]) == 0
    assert f"left out {shown_name(path)}: the file is empty" in capsys.readouterr().err
