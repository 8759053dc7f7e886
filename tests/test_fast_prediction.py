"""The fast way to predict: folded, in worker threads, in order, and with the results of the plain way."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
import threading

import pytest
import timm
import torch
from image_trees import write_tree
from PIL import Image
from timm.layers import Conv2dSame
from torch import nn

import flashtask
from flashtask import ImageClassifier
from flashtask.core.allocator import keep_freed_memory
from flashtask.core.errors import BadDataError
from flashtask.core.folding import TOLERANCE, _FusedConvolution, folded_copy
from flashtask.core.worker_threads import fitting_threads, in_order
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import Fitting
from flashtask.tasks.prediction import predictions_of

IMAGES = 40


def with_statistics(module: nn.Module) -> nn.Module:
    """BatchNorm as after training: neither its statistics nor its weights are the ones it begins with."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
    return module.eval()


def images_of(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = write_tree(tmp_path_factory.mktemp("images"), {"a": IMAGES}, (48, 40))
    return sorted(str(path) for path in root.rglob("*.png"))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    made = ImageClassifier("timm/test_efficientnet", labels=("a", "b", "c"), pretrained=False)
    with_statistics(made.backbone)
    nn.init.normal_(made.head[0].weight, std=0.5)
    return made.eval()


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_mambaout", "test_vit", "test_convnext"])
def test_folding_leaves_the_outputs_and_the_module_as_they_were(name, fuses):
    module = with_statistics(timm.create_model(name, num_classes=5))
    given = images_of(96)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        outputs = module(given)
        copy = folded_copy(module, images_of(96), fuses=fuses)
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        if not norms:
            assert copy is None
            return
        assert not any(isinstance(part, nn.BatchNorm2d) for part in copy.modules())
        assert (copy(given) - outputs).abs().max() <= TOLERANCE * outputs.abs().max()
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_convolution_is_computed_with_the_activation_behind_it(activation, in_place):
    module = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(in_place)))
    copy = folded_copy(module, images_of(20), fuses=True)
    assert [type(part) for part in copy] == [_FusedConvolution, nn.Identity, nn.Identity]
    for side in (20, 31):  # what it was made for, and another size
        with torch.no_grad():
            assert (copy(images_of(side)) - module(images_of(side))).abs().max() < 1e-5


@pytest.mark.parametrize("side", [20, 21, 22, 23])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (2, 2), (4, 3)])
def test_padding_as_tensorflow_does_it_is_the_same_without_a_padded_copy(side, kernel, stride):
    convolution = Conv2dSame(3, 6, kernel, stride)
    module = with_statistics(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.ReLU6()))
    copy = folded_copy(module, images_of(side), fuses=True)
    assert type(copy[0]) is _FusedConvolution
    with torch.no_grad():
        assert (copy(images_of(side)) - module(images_of(side))).abs().max() < 1e-5


class Changed(nn.Module):
    """What the activation takes is not what the convolution gave, though it is the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.norm(self.conv(images))
        found += images
        return self.act(found)


def test_an_activation_behind_a_residual_is_not_fused_and_the_rest_is_folded():
    module = with_statistics(Changed())
    copy = folded_copy(module, images_of(16), fuses=True)
    assert (type(copy.conv), type(copy.norm), type(copy.act)) == (nn.Conv2d, nn.Identity, nn.ReLU)
    with torch.no_grad():
        assert (copy(images_of(16)) - module(images_of(16))).abs().max() < 1e-5


class Twice(nn.Module):
    """The output of the convolution goes somewhere else too, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.conv(images)
        return self.norm(found) + found


class Shared(Twice):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)) + self.conv(images)


class Apart(Twice):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images).relu())


@pytest.mark.parametrize("kind", [Twice, Shared, Apart])
def test_what_cannot_be_folded_exactly_is_not(kind):
    assert folded_copy(with_statistics(kind()), images_of(16)) is None


def test_a_layer_with_a_hook_or_weights_made_anew_is_not_folded():
    hooked = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    hooked[0].register_forward_hook(lambda *_: None)
    assert folded_copy(hooked, images_of(16)) is None
    normed = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch.nn.utils.parametrizations.weight_norm(normed[0])
    assert folded_copy(normed, images_of(16)) is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_threads", "precision", "tolerance"),
    [
        (1, "32", 1e-5),
        (3, "32", 1e-5),
        (3, "bf16-mixed", 0.05),
        pytest.param(1, "bf16-mixed", 0.05, marks=pytest.mark.long),
    ],
)
def test_worker_threads_give_the_results_of_the_plain_way(precision, tolerance, num_threads, task, paths, monkeypatch):
    monkeypatch.setattr(task, "default_precision", precision)
    items = [Image.open(path).convert("RGB") if number % 7 == 3 else path for number, path in enumerate(paths)]
    plain = list(predictions_of(task, items, num_threads=0))
    fast = list(predictions_of(task, items, 6, num_threads=num_threads, cache=DecodedCache(2**22)))
    assert [one.path for one in fast] == [one.path for one in plain]
    assert len(fast) == IMAGES
    for ours, theirs in zip(fast, plain, strict=True):
        gaps = [abs(ours.probabilities[label] - score) for label, score in theirs.probabilities.items()]
        assert max(gaps) < tolerance
        assert ours.label == theirs.label or theirs.scores[0] - theirs.scores[1] < 2 * tolerance


def test_prediction_leaves_the_task_as_it_was(task, paths):
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    threads, kinds = torch.get_num_threads(), [type(part) for part in task.modules()]
    list(predictions_of(task, paths, num_threads=2))
    assert [type(part) for part in task.modules()] == kinds
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert all(parameter.dtype is torch.float32 for parameter in task.parameters())


@pytest.mark.long
def test_each_lane_computes_with_its_share_of_the_threads(task, paths, monkeypatch):
    seen = set()
    step = ImageClassifier.predict_step

    def watched(self, *arguments):
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return step(self, *arguments)

    monkeypatch.setattr(ImageClassifier, "predict_step", watched)
    torch.set_num_threads(2)
    try:
        list(predictions_of(task, paths, 4, num_threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert {threads for _, threads in seen} == {1}
    assert all(name.startswith("flashtask-worker") for name, _ in seen)


def test_a_network_of_ones_own_is_not_run_in_several_threads(task):
    own = copy.deepcopy(task)
    own.backbone.add_module("own", type("Own", (nn.Identity,), {})())
    assert fitting_threads(own, 1000, 4) == 0
    assert fitting_threads(task, 1000, 4) >= 1
    assert fitting_threads(task, 5, 4) == 0


def test_a_bad_file_in_a_lane_is_told_and_the_threads_end(task, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    results = predictions_of(task, [*paths, str(bad)], 4, num_threads=2)
    with pytest.raises(BadDataError, match=r"bad\.png"):
        list(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flashtask-worker")]


def test_jobs_are_not_begun_long_before_their_results_are_wanted():
    begun = []
    results = in_order(lambda job: begun.append(job) or job, range(100), 2, lambda: None)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert len(begun) <= 6


@pytest.mark.long
def test_the_command_decodes_each_file_once_and_writes_what_python_says(task, paths, tmp_path, monkeypatch):
    from flashtask import Trainer
    from flashtask.cli import run

    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = write_tree(tmp_path / "data", {"a": 2, "b": 2, "c": 2}, (40, 40))
    trainer.fit(task, datamodule=flashtask.ImageClassificationData.from_folders(data))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    reads = []
    read = Fitting.read
    monkeypatch.setattr(Fitting, "read", lambda self, path, *rest: (reads.append(path), read(self, path, *rest))[1])
    output = tmp_path / "out.csv"
    assert run(["predict", str(tmp_path / "model.ckpt"), *paths, "--format", "csv", "--output", str(output)]) == 0
    assert sorted(reads) == paths
    rows = list(csv.DictReader(output.read_text().splitlines()))
    expected = flashtask.load(tmp_path / "model.ckpt").predict(paths)
    assert [row["path"] for row in rows] == paths
    assert all(abs(float(r["score"]) - e.score) < 1e-5 for r, e in zip(rows, expected, strict=True))


def test_freed_memory_is_kept_only_where_nobody_chose_otherwise():
    code = "from flashtask.core.allocator import keep_freed_memory as k; print(k())"
    own = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['MALLOC_ARENA_MAX'] = '2'; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert own.stdout.strip() == "False"
    assert keep_freed_memory() is keep_freed_memory()
