"""`flashtask bench`: what is measured, what is marked as auto's choice, and how it ends early."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from flashtask import BACKBONES, ImageClassifier, Trainer
from flashtask.cli import run
from flashtask.core.worker_threads import fitting_threads
from flashtask.data.threads import num_cores
from flashtask.tasks import speed
from flashtask.tasks.speed import Rate, auto_choice, prepared_speed
from flashtask.trainer.devices.accelerators import CPUAccelerator

QUICK = ["--seconds", "0.01", "--batch-size", "2", "--accelerator", "cpu"]
SMALL = "timm/test_efficientnet"


class Net(nn.Module):
    """Counts the calls in training mode, and breaks at one of them."""

    def __init__(self, breaks_at: int, error: BaseException, calls: list[int]) -> None:
        super().__init__()
        self.convolution, self.breaks_at = nn.Conv2d(3, 4, 3, stride=8), breaks_at
        self.error, self.calls = error, calls

    def __deepcopy__(self, memo):
        made = Net(self.breaks_at, self.error, self.calls)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, images):
        if self.training:
            self.calls.append(len(images))
            if len(self.calls) == self.breaks_at:
                raise self.error
        return self.convolution(images).mean((2, 3))


@pytest.fixture
def breaking():
    """Registers a backbone that breaks in its nth training step."""
    names = []

    def register(breaks_at, error):
        names.append(f"breaking_{breaks_at}")
        calls = []
        BACKBONES.register(names[-1])(lambda: Net(breaks_at, error, calls))
        return names[-1]

    yield register
    for name in names:
        BACKBONES.remove(name)


@pytest.fixture(autouse=True, scope="module")
def little_is_measured():
    """A larger photograph of 3 megapixels, two rounds, and few predictions in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_CAMERA", (2000, 1500))
        patch.setattr(speed, "_ROUNDS", 2)
        patch.setattr(speed, "_LEAST_PREDICTED", 4)
        yield


def measured(capsys, *options):
    assert run(["bench", SMALL, *QUICK, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def of(found, work):
    return [rate for rate in found["rates"] if rate["work"] == work]


@pytest.fixture(scope="module")
def fast_bfloat16(little_is_measured):
    """What is measured where the processor computes bfloat16."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(CPUAccelerator, "computes_bfloat16", lambda self, device: True)
        assert run(["bench", SMALL, *QUICK, "--json"]) == 0
    return json.loads(printed.getvalue())


@pytest.mark.long
def test_every_number_format_and_layout_is_measured_with_and_without_training(fast_bfloat16):
    found = fast_bfloat16
    formats = [f"{name}, {layout}" for name in ("32", "bf16-mixed") for layout in ("contiguous", "channels_last")]
    for work in ("forward", "train"):
        assert [rate["option"] for rate in of(found, work)] == formats
    for rate in found["rates"]:
        assert 0 < rate["min"] <= rate["images_per_second"] <= rate["max"]
    assert found["is_complete"]
    assert found["backbone"] == SMALL
    assert found["batch_size"] == 2
    assert found["machine"]["torch"] == f"torch {torch.__version__}"
    # A small picture takes less than one with 16 times as many pixels; the fastest round is the least disturbed.
    small, large = (next(r for r in of(found, "decode") if size in r["option"]) for size in ("500x375", "2000x1500"))
    assert small["max"] > large["max"]


@pytest.mark.long
@pytest.mark.parametrize("has_bfloat16", [pytest.param(False, marks=pytest.mark.long), True])
def test_the_marked_rows_are_what_a_fit_and_a_prediction_take(
    has_bfloat16, fast_bfloat16, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(CPUAccelerator, "computes_bfloat16", lambda self, device: has_bfloat16)
    found = fast_bfloat16 if has_bfloat16 else measured(capsys)
    task = ImageClassifier(SMALL, num_classes=2, pretrained=False)
    trainer = Trainer(accelerator="cpu", max_steps=1, output_dir=tmp_path / "run")
    trainer.fit(task, [(torch.randn(2, *task.preprocessing.input_size), torch.tensor([0, 1]))])
    taken = trainer.fit_run
    layout = "channels_last" if taken.memory_format is torch.channels_last else "contiguous"
    for work, precision in (("forward", taken.inference_precision), ("train", taken.precision)):
        assert [rate["option"] for rate in of(found, work) if rate["is_auto"]] == [f"{precision.name}, {layout}"]
    auto = found["auto"]
    assert (auto["precision"], auto["memory_format"], found["device"]) == (taken.precision.name, layout, "cpu")
    lanes = fitting_threads(task, 1000, num_cores())
    assert lanes >= 1
    assert auto["lanes"] == lanes
    (predicted,) = (rate["option"] for rate in of(found, "predict") if rate["is_auto"])
    assert predicted.startswith(f"files, BatchNorm folded, {lanes} lane")


@pytest.mark.filterwarnings("ignore:the hyper-parameter backbone")
def test_a_network_without_convolutions_is_contiguous():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, images):
            return self.layer(images.mean((2, 3)))

    task = ImageClassifier(Plain(), num_classes=2, pretrained=False)
    assert auto_choice(task, "cpu").memory_format == "contiguous"
    assert auto_choice(ImageClassifier(SMALL, num_classes=2, pretrained=False), "cpu").memory_format == "channels_last"


@pytest.mark.long
def test_the_table_fits_80_columns_marks_auto_and_says_why(breaking, capsys):
    name = breaking(10**6, KeyboardInterrupt())  # which it never comes to
    assert run(["bench", name, *QUICK]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith(f"{name}, images of 3x")
    assert lines[0].endswith("batches of 2, cpu")
    marked = [line.split()[1] for line in lines if line.startswith("* ")]
    assert marked == ["forward", "train", "predict", "decode", "decode", "auto:"]
    text = " ".join(printed.out.split())
    assert "bfloat16" in text
    assert "channels_last, as the network has 2-D convolutions" in text
    assert "1,000 photographs of 500x375, decoding included: about" in text
    assert lines[-1].endswith(f"torch {torch.__version__}")
    assert printed.err.startswith("measuring 1")


def test_the_estimates_add_decoding_to_the_network():
    with prepared_speed(SMALL, batch_size=2, accelerator="cpu") as prepared:
        assert prepared.seconds_per_image("train") is None
        prepared.rates = [
            Rate("forward", "a", None, is_auto=True, rounds=[10.0]),
            Rate("forward", "b", None, rounds=[1000.0]),
            Rate("train", "a", None, is_auto=True, rounds=[2.0, 4.0, 9.0]),
            Rate("decode", "photograph", None, is_auto=True, rounds=[100.0]),
            Rate("decode", "camera", None, is_auto=True, rounds=[5.0]),
        ]
        assert prepared.seconds_per_image("forward") == pytest.approx(0.11)
        assert prepared.seconds_per_image("train") == pytest.approx(0.26)


def test_ctrl_c_shows_what_was_measured_so_far(breaking, capsys):
    # Four training steps before the first round, and the first one of the round.
    name = breaking(5, KeyboardInterrupt())
    assert run(["bench", name, *QUICK, "--json"]) == 130
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [rate["work"] for rate in found["rates"]] == ["forward"] * 4
    assert not found["is_complete"]
    assert found["seconds_per_1000_images"] == {}
    assert "stopped (Ctrl-C)" in printed.err


def test_ctrl_c_before_anything_was_measured_only_says_so(breaking, capsys):
    assert run(["bench", breaking(1, KeyboardInterrupt()), *QUICK]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "stopped (Ctrl-C)" in printed.err


def test_a_lack_of_memory_is_answered_with_a_smaller_batch(breaking, capsys):
    name = breaking(2, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert run(["bench", name, "--seconds", "0.01", "--batch-size", "6", "--accelerator", "cpu"]) == 81
    told = capsys.readouterr().err
    assert "out of memory with batches of 6" in told
    assert "fix: --batch-size 3" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["resnte18"], "did you mean 'resnet18'"),
        ([SMALL, "--batch-size", "0"], "--batch-size: must be"),
        ([SMALL, "--seconds", "-1"], "--seconds: must be"),
        ([SMALL, "--acelerator", "cpu"], "did you mean --accelerator?"),
    ],
)
def test_what_cannot_be_meant_is_told_before_torch_is_loaded(options, told):
    code = (
        "import sys\nfrom flashtask.cli import run\n"
        f"assert run(['bench', *{options!r}]) == 2\nassert 'torch' not in sys.modules\n"
        "assert run(['bench', '--help']) == 0\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told in done.stderr
    assert "--batch-size N" in done.stdout


@pytest.mark.long
def test_the_forward_pass_is_compiled_when_asked_for(capsys):
    rates = of(measured(capsys, "--compile"), "forward")
    assert [rate["option"].endswith("compiled") for rate in rates] == [False] * 4 + [True]
    assert sum(rate["is_auto"] for rate in rates) == 1
