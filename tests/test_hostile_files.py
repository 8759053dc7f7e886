"""Hostile files of every kind, through the public doors: no code runs, memory and time are bounded, files are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.good import make_good_files
from hostile.kinds import KINDS

HERE = Path(__file__).parent
MEGABYTES, SECONDS = 1000, 10


def _is_short(kind) -> bool:
    """Whether it is among every eighth of the kinds that come through its door: only one of these needs a child."""
    through = [one for one in KINDS if one.door == kind.door]
    return kind in (through[5::8] or through[-1:])


MARKS = {"short": (), "long": pytest.mark.long}
PARTS = {part: [kind for kind in KINDS if _is_short(kind) == (part == "short")] for part in MARKS}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What the watching process tells of every kind of a part."""
    kinds = PARTS[request.param]
    root = tmp_path_factory.mktemp("hostile")
    good = root / "good"
    good.mkdir()
    make_good_files(good)
    (root / "hostile_canary.py").write_text(f"open({str(root / 'canary')!r}, 'w')\nrun = print\n")
    common = {"images": str(good / "images"), "output": str(root / "may_write" / "output")}
    hostile, made = [], {}
    for number, kind in enumerate(kinds):
        if kind.name not in made:
            folder = root / f"{number:03}"
            folder.mkdir()
            made[kind.name] = kind.make(good, folder)
        path = made[kind.name]
        output = str(root / "may_write" / f"{number:03}")
        hostile.append({"kind": kind.name, "door": kind.door, "path": str(path), **common, "output": output})
    fine = [
        {"door": "load", "path": str(good / "last.ckpt")},
        {"door": "from_pretrained", "path": str(good / "timm")},
        {"door": "load", "path": str(good / "folder")},
        {"door": "weights", "path": str(good / "weights.pth")},
        {"door": "recipe", "path": str(good / "recipe.yaml")},
        {"door": "zoo", "path": str(good / "zoo.yaml")},
        {"door": "predict", "path": str(good / "last.ckpt")},
        {"door": "fit", "path": str(good / "last.ckpt")},
    ]
    found = watch(root, {"good": [{**case, **common} for case in fine], "hostile": hostile})
    assert len(found) == len(kinds)
    return root, {(case["kind"], case["door"]): case for case in found}


def watch(root, cases):
    (root / "cases.json").write_text(json.dumps(cases))
    for name in ("may_write", "may_write/temporary", "may_write/cache"):
        (root / name).mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TMPDIR": str(root / "may_write" / "temporary"),
        "FLASHTASK_CACHE": str(root / "may_write" / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(HERE / "hostile" / "watch.py"), "cases.json", "results.json", "may_write"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize(
    ("results", "kind", "door", "code"),
    [
        pytest.param(part, *kind[:3], marks=MARKS[part], id=f"{kind.name}: {kind.door}")
        for part, kinds in PARTS.items()
        for kind in kinds
    ],
    indirect=["results"],
    scope="module",
)
def test_h_a_hostile_file_is_refused(results, kind, door, code):
    case = results[1][kind, door]
    assert case["outcome"] != "loaded"
    assert case["code"] == code, case["message"]
    assert case["path"] in case["message"].replace("\n", " ")
    assert case["seen"] == []
    assert case["seconds"] < SECONDS
    assert case["megabytes"] < MEGABYTES


@pytest.mark.parametrize(
    "results", [pytest.param(part, marks=MARKS[part]) for part in PARTS], indirect=True, scope="module"
)
def test_h_no_payload_ran_and_nothing_was_left(results):
    root, found = results
    assert not (root / "canary").exists()
    assert not any(root.glob("*/canary"))
    assert list((root / "may_write" / "temporary").iterdir()) == []
    assert max(case["child_megabytes"] for case in found.values()) < MEGABYTES
