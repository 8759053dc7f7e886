"""A hundred mistyped command lines: each is answered with the nearest right name, and writes nothing."""

from __future__ import annotations

import random
import re
import string

import pytest

from flashtask.cli import run
from flashtask.cli.options import FINETUNE, PREDICT

COMMANDS = ["finetune", "tune", "predict", "validate", "test", "zoo"]
BACKBONES = [
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "vit_base_patch16_224",
    "mobilenetv3_small_100",
    "convnext_tiny",
]
HEADS = ["linear", "mlp"]
STRATEGIES = ["freeze", "no_freeze", "freeze_unfreeze", "unfreeze_milestones"]


def mistyped(word: str, edits: int, rng: random.Random) -> str:
    """`word` after some deletions, insertions, substitutions or swaps of letters."""
    letters = list(word)
    for _ in range(edits):
        place = rng.randrange(len(letters))
        kind = rng.choice("diss" if len(letters) > 3 else "i")
        if kind == "d":
            del letters[place]
        elif kind == "i":
            letters.insert(place, rng.choice(string.ascii_lowercase))
        elif kind == "s" and place + 1 < len(letters):
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        else:
            letters[place] = rng.choice(string.ascii_lowercase)
    return "".join(letters)


def distance(a: str, b: str) -> int:
    """How many letters to delete, insert, change or swap to get from `a` to `b`."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            steps = [before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)]
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                steps.append(earlier[j - 2] + 1)
            row.append(min(steps))
    return row[-1]


def cases() -> list[tuple[list[str], str, str]]:
    """(command line, the mistyped word, the right one)."""
    rng = random.Random(20)
    found: list[tuple[list[str], str, str]] = []

    def add(words: list[str], count: int, known: list[str], line) -> None:
        while count:
            right = rng.choice(words)
            wrong = mistyped(right, rng.choice([1, 2]) if len(right) > 5 else 1, rng)
            if wrong not in known:
                found.append((line(wrong), wrong, right))
                count -= 1

    long = [o.flag[2:] for o in FINETUNE]
    add(long, 40, long, lambda w: ["finetune", "data", f"--{w}", "1"])
    add(
        [o.flag[2:] for o in PREDICT],
        10,
        [o.flag[2:] for o in PREDICT],
        lambda w: ["predict", "a.ckpt", "b.png", f"--{w}", "1"],
    )
    add(COMMANDS, 15, COMMANDS, lambda w: [w, "data"])
    add(BACKBONES, 20, BACKBONES, lambda w: ["finetune", "data", "--backbone", w])
    add(HEADS, 5, HEADS, lambda w: ["finetune", "data", "--head", w])
    add(STRATEGIES, 15, STRATEGIES, lambda w: ["finetune", "data", "--strategy", w])
    return found


def suggestions(message: str) -> list[str]:
    found = re.search(r"did you mean (.+?)\?", message)
    return [word.strip("'\"-") for word in found.group(1).split(" or ")] if found else []


def test_j_mistyped_names_are_answered_with_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").mkdir()
    before = sorted(tmp_path.rglob("*"))
    unanswered = []
    all_cases = cases()
    assert len(all_cases) >= 100
    for argv, wrong, right in all_cases:
        code = run(argv)
        printed = capsys.readouterr()
        assert code == 2, (argv, code, printed.err)
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert len(printed.err.splitlines()) <= 8
        assert "Traceback" not in printed.err
        best = min((distance(wrong, s) for s in suggestions(printed.err)), default=99)
        if best > distance(wrong, right):
            unanswered.append((argv, printed.err))
    assert len(unanswered) <= 0.05 * len(all_cases), unanswered
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["finetune", "d", "--gpus", "2"], "--accelerator gpu --devices N"),
        (["finetune", "d", "--gpus=-1"], "--accelerator gpu --devices N"),
        (["finetune", "d", "--resume-from-checkpoint", "a.ckpt"], "--resume"),
        (["finetune", "d", "--resume_from_checkpoint=a.ckpt"], "--resume"),
        (["finetune", "d", "--max_epochs", "2"], "--epochs"),
        (["finetune", "d", "--progress_bar_refresh_rate", "0"], "--quiet"),
        (["finetune", "d", "--trainer.max_epochs", "2"], "--set trainer.max_epochs="),
        (["finetune", "d", "-epochs", "2"], "--epochs"),
        (["finetune", "d", "--top-k", "2"], "`flashtask predict`"),
        (["finetune", "d", "--epochs"], "--epochs needs a value"),
        (["finetune", "d", "--epochs", "0"], "must be at least 1"),
        (["finetune", "d", "--epochs", "two"], "not a whole number"),
        (["finetune", "d", "--batch-size", "0"], "must be at least 1"),
        (["finetune", "d", "--batch-size", "-4"], "must be at least 1"),
        (["finetune", "d", "--batch-size", "1.5"], "not a whole number"),
        (["finetune", "d", "--lr", "0"], "must be above 0"),
        (["finetune", "d", "--lr", "nan"], "must be above 0"),
        (["finetune", "d", "--val-split", "1.5"], "below 1"),
        (["finetune", "d", "--precision", "fp16"], "16"),
        (["finetune", "d", "--accelerator", "gpuu"], "did you mean 'gpu'"),
        (["finetune", "d", "--devices", "0"], "number of devices"),
        (["finetune", "d", "--seed", "-1"], "must be at least 0"),
        (["finetune", "d", "--on-bad-image", "ignore"], "error, skip"),
        (["finetune", "d", "--strategy", "freeze_unfreeze"], "freeze_unfreeze:5"),
        (["finetune", "d", "--strategy", "ddp"], "distribution"),
        (["finetune", "d", "--set", "trainer.max_epochs"], "KEY=VALUE"),
        (["finetune", "d", "--set", "trainr.max_epochs=1"], "did you mean 'trainer'"),
        (["finetune", "d", "--set", "trainer.max_epochs=many"], "not a whole number"),
        (["finetune", "d", "--output-dir", ""], "--output-dir: is empty"),
        (["finetune", ""], "DATA"),
        (["finetune"], "flashtask finetune DATA"),
        (["finetune", "a", "b"], "unexpected extra argument"),
        (["finetune", "d", "--resume"], "--output-dir"),
        (["predict"], "MODEL"),
        (["predict", "a.ckpt"], "INPUT"),
        (["zoo", "--kind", "backbones"], "did you mean 'backbone'"),
        (["zoo", "show"], "needs one name"),
        (["zoo", "resnt18"], "did you mean"),
        (["häuser"], "flashtask has no command 'häuser'"),
    ],
)
def test_j_wrong_values_and_old_names_are_told_what_to_type(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
