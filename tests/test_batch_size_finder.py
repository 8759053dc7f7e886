"""The batch-size search: what is measured, what follows from it, where it goes, and that nothing else changes."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
import warm
from fingerprints import fingerprint, of_files, of_process
from small import colour_folders, digest
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from flashtask import DataModule, ImageClassificationData, ImageClassifier, Module, Preprocessing, Trainer
from flashtask.core.errors import OutOfMemoryError, UsageError
from flashtask.core.memory import MemoryWatch, give_back_memory, memory_in_use, memory_limits
from flashtask.trainer.finetuning.strategies import resolve_finetuning
from flashtask.trainer.run_preparation import data_of
from flashtask.trainer.tuning.batch_size_finder import _Attempts, _by_trying, batch_size_in
from flashtask.trainer.tuning.batch_size_search import (
    BatchSizeOptions,
    MemoryPoint,
    expected_memory,
    largest_fitting,
    largest_within,
)
from flashtask.trainer.tuning.trials import trial
from flashtask.trainer.tuning.tune import tune


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(max_epochs=1, seed=2, **options)


def search(tmp_path, module, data=None, trainer=None, strategy=None, **options):
    finetuning = None if strategy is None else resolve_finetuning(strategy)
    trainer = trainer or quiet(tmp_path)
    return tune(trainer, module, data_of(module, data), finetuning=finetuning, batch_size=options or True).batch_size


class Images(Module):
    """Takes some megabytes of memory for each sample of a batch, and brings its own data."""

    #: what each step saw, of every copy: (batch size, whether the backbone trains)
    steps: list[tuple[int, bool]] = []

    def __init__(self, samples=1000, size=64, channels=64, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.samples, self.size = batch_size, samples, size
        layers = [torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.BatchNorm2d(channels), torch.nn.ReLU()]
        self.backbone = torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, channels, 3, padding=1))
        self.head = torch.nn.Linear(channels, 2)

    def training_step(self, batch, batch_idx):
        self.steps.append((len(batch[0]), self.backbone[0].weight.requires_grad))
        return torch.nn.functional.cross_entropy(self.head(self.backbone(batch[0]).mean((2, 3))), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}

    def train_dataloader(self):
        inputs = torch.zeros(1, 3, self.size, self.size).expand(self.samples, -1, -1, -1)
        return DataLoader(TensorDataset(inputs, torch.zeros(self.samples).long()), batch_size=self.batch_size)


class Pointwise(Images):
    """Keeps some megabytes of activations for each sample, and needs no working memory beside them."""

    def __init__(self):
        super().__init__(size=128)
        self.backbone = torch.nn.Linear(1, 1)
        self.head = torch.nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        maps = batch[0] * self.backbone.weight
        for _ in range(6):
            maps = torch.sigmoid(maps)
        return torch.nn.functional.cross_entropy(self.head(maps.mean((2, 3))), batch[1])


class Loading(DataModule):
    def __init__(self, batch_size=4, samples=40, size=8, **loading):
        self.batch_size, self.samples, self.size, self.loading = batch_size, samples, size, loading

    def train_dataloader(self):
        inputs = torch.zeros(1, 3, self.size, self.size).expand(self.samples, -1, -1, -1)
        data = TensorDataset(inputs, torch.zeros(self.samples).long())
        return DataLoader(data, batch_size=self.batch_size, **self.loading)


class Plain(Images):
    """Has no batch size and no data of its own."""

    train_dataloader = None

    def __init__(self):
        super().__init__(channels=4)
        self._hparams.clear()
        del self.batch_size


# ---- what is found


@pytest.mark.long
def test_s28_the_number_of_samples_bounds_the_batch_size(tmp_path):
    for mode, expected in (("power", 32), ("binsearch", 50)):
        module = Images(samples=50, size=8)
        found = search(tmp_path, module, mode=mode)
        assert (found.batch_size, found.bound, found.samples) == (expected, "data", 50)
        assert module.batch_size == module.hparams.batch_size == expected
        assert str(found) == f"batch size {expected}: there are 50 training samples"


@pytest.mark.long
def test_s28_no_more_than_max_batch_size_is_looked_for(tmp_path):
    found = search(tmp_path, Images(size=8))
    assert (found.batch_size, found.bound) == (256, "max_batch_size")
    found = search(tmp_path, Images(size=8), mode="binsearch", max_batch_size=7)
    assert (found.batch_size, found.bound) == (7, "max_batch_size")
    assert [point.batch_size for point in found.points] == [2, 4, 7]
    assert search(tmp_path, Images(samples=1, size=8)).batch_size == 1


@pytest.mark.long
def test_s28_real_steps_are_trained_at_a_few_small_sizes_only(tmp_path):
    Images.steps.clear()
    found = search(tmp_path, Images(channels=16))
    assert [size for size, _ in Images.steps] == [2, 2, 4, 4, 8, 8, 16, 16, 32, 32]
    assert [point.batch_size for point in found.points] == [2, 4, 8, 16, 32]
    assert all(a.memory < b.memory for a, b in zip(found.points, found.points[1:], strict=False))


# Which blocks of the heap are reused is chance, and changes the peak by a quarter; mapped ones end when they are freed.
LINE = """
import ctypes
from pathlib import Path
from test_batch_size_finder import Pointwise, needed_at, search
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
search(Path("."), Pointwise(), max_batch_size=2)  # what is loaded on first use is loaded, and is no part of the line
module = Pointwise()
found = search(Path("."), module)
print(found.points[-1].batch_size, found.expected_memory(128), needed_at(128, Path("."), module))
"""


def needed_at(batch_size, folder, module):
    """Bytes that steps of training took."""
    with trial(quiet(folder), module, data_of(module, None)) as copies:
        attempts = _Attempts(copies, batch_size_in(copies.module, copies.data, "batch_size"), None)
        before = memory_in_use()
        with MemoryWatch() as watch:
            attempts.run(batch_size)
    return watch.peak - before


@pytest.mark.long
def test_s28_the_line_reaches_sizes_that_were_not_measured(tmp_path):
    """At 128 samples, four times the largest measured, no more memory is needed than was said, and not much less.

    Pointwise operations take memory in proportion to the batch on every processor. Convolutions do not: the library
    behind them takes working memory in steps that depend on the processor, so no line through small sizes is exact.
    """
    done = alone(tmp_path, LINE)
    assert done.returncode == 0, done.stderr
    largest, expected, needed = map(int, done.stdout.split())
    assert largest == 32
    assert needed <= expected <= 1.2 * needed


LIMITED = """
import json, resource
from pathlib import Path
from test_batch_size_finder import Images, quiet, search
from flashtask.core.memory import _of_status
search(Path("."), Images(samples=4, channels=16))  # what is loaded on first use is loaded
limit = _of_status("VmPeak", Path("/proc")) + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
module = Images(channels={channels}, size={size})
found = search(Path("."), module, mode={mode!r})
print(json.dumps([found.batch_size, found.bound, found.memory.name, found.expected_memory(found.batch_size),
                  found.memory.free, module.batch_size]))
module.batch_size = found.batch_size
quiet(Path("."), max_steps=3, logger=False, enable_checkpointing=False).fit(module)
"""


def limited(tmp_path, megabytes, mode, channels=16, size=64):
    """A search, and a fit with what it found, in a process that may use so much more memory and no more."""
    return alone(tmp_path, LIMITED, megabytes=megabytes, mode=mode, channels=channels, size=size)


def alone(tmp_path, code, **values):
    """Runs code in a process of its own: a heap that other tests left in pieces takes up to a fifth more."""
    with contextlib.chdir(tmp_path):
        return warm.run(code.format(**values))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_s28_memory_bounds_the_batch_size_and_a_fit_with_it_fits(tmp_path, mode):
    done = limited(tmp_path, 300, mode)
    assert done.returncode == 0, done.stderr
    size, bound, name, expected, free, given = json.loads(done.stdout)
    assert (bound, name, given) == ("memory", "`ulimit -v`", size)
    assert 16 <= size < 256
    assert expected <= 0.8 * free
    if mode == "power":
        assert size & (size - 1) == 0
    else:
        assert expected > 0.7 * free


@pytest.mark.long
def test_s28_where_nothing_fits_that_is_said(tmp_path):
    # One activation is 64 MiB, so it is torch's allocator that finds no room, and not a library below it.
    done = limited(tmp_path, 8, "power", channels=64, size=512)
    assert done.returncode == 1
    assert "OutOfMemoryError" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(("mode", "expected"), [("power", 32), ("binsearch", 40)])
def test_s28_where_a_lack_of_memory_can_be_caught_sizes_are_tried(tmp_path, mode, expected):
    """The search for accelerators, on a CPU that says what CUDA would say."""

    class Full(Images):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 40:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().training_step(batch, batch_idx)

    module = Full(samples=100, size=8)
    before = fingerprint(module)
    with trial(quiet(tmp_path), module, data_of(module, None)) as copies:
        attempts = _Attempts(copies, batch_size_in(copies.module, copies.data, "batch_size"), None)
        found = _by_trying(attempts, BatchSizeOptions(mode))
    assert (found.batch_size, found.bound) == (expected, "memory")
    assert max(point.batch_size for point in found.points) == expected
    assert fingerprint(module) == before


def test_the_search_by_trying_finds_the_last_that_fits():
    for most in range(70):
        tried: list[int] = []

        def fits(size, most=most, tried=tried):
            tried.append(size)
            return size <= most

        assert largest_fitting(fits, 64, "binsearch") == min(most, 64)
        assert len(tried) == len(set(tried)) <= 14
        expected = 0 if most < 2 else min(64, 2 ** (most.bit_length() - 1))
        assert largest_fitting(fits, 64, "power") == expected
    assert largest_fitting(lambda size: True, 50, "power") == 32
    assert largest_fitting(lambda size: True, 1, "power") == 1


def test_the_steepest_line_to_the_largest_point_is_taken_with_a_margin():
    points = [MemoryPoint(2, 100), MemoryPoint(4, 110), MemoryPoint(8, 150)]
    assert expected_memory(points, 8) == pytest.approx(1.1 * 150, abs=1)
    assert expected_memory(points, 18) == pytest.approx(1.1 * (150 + 10 * 10), abs=1)
    assert expected_memory(points[:1], 4) == pytest.approx(1.1 * 200, abs=1)
    falling = [MemoryPoint(2, 100), MemoryPoint(4, 90)]
    assert expected_memory(falling, 1000) == pytest.approx(99, abs=1)
    assert largest_within(1.1 * 250, points, 100) == 18
    assert largest_within(1.1 * 250, points, 10) == 10
    assert largest_within(10, points, 100) == 0


# ---- what is trained


@pytest.mark.long
def test_s28_the_backbone_trains_as_much_as_it_ever_will(tmp_path):
    Images.steps.clear()
    search(tmp_path, Images(size=8), strategy="freeze_unfreeze:3", max_batch_size=4)
    assert all(trains for _, trains in Images.steps)
    Images.steps.clear()
    search(tmp_path, Images(size=8), strategy="freeze", max_batch_size=4)
    assert not any(trains for _, trains in Images.steps)


@pytest.mark.long
def test_s28_a_group_of_accumulated_batches_is_measured_as_a_whole(tmp_path):
    Images.steps.clear()
    search(tmp_path, Images(size=8), trainer=quiet(tmp_path, accumulate_grad_batches={0: 1, 4: 3}), max_batch_size=2)
    assert [size for size, _ in Images.steps] == [2] * 6


@pytest.mark.long
def test_s28_a_module_that_steps_by_hand_can_be_searched(tmp_path):
    class ByHand(Images):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer.step()

    assert search(tmp_path, ByHand(size=8), max_batch_size=8).batch_size == 8

    class Never(ByHand):
        def training_step(self, batch, batch_idx):
            pass

    assert search(tmp_path, Never(size=8), max_batch_size=8).batch_size == 8


@pytest.mark.long
def test_s28_what_worker_processes_hold_counts(tmp_path):
    class Light(Plain):
        def training_step(self, batch, batch_idx):
            return self.head(batch[0].mean((2, 3)).mean(1, keepdim=True).expand(-1, 4)).mean()

    def needed(workers):
        data = Loading(size=512, num_workers=workers)
        return search(tmp_path, Light(), data, max_batch_size=8).points[-1].memory

    # Two batches ahead and one in the making, each of eight images of 3 MiB.
    assert needed(workers=1) - needed(workers=0) > 3 * 8 * 3 * 2**20 / 2


@pytest.mark.long
def test_s28_nothing_is_learned_so_nothing_can_diverge(tmp_path):
    class Steep(Images):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e30)

    assert search(tmp_path, Steep(size=8), max_batch_size=16).batch_size == 16


# ---- where it goes


@pytest.mark.long
def test_s28_the_batch_size_of_a_data_module_is_found(tmp_path):
    data = Loading()
    assert search(tmp_path, Plain(), data).batch_size == data.batch_size == 32

    class Saved(DataModule):
        def __init__(self, batch_size=4):
            self.save_hyperparameters()

        def train_dataloader(self):
            return Loading(self.hparams.batch_size).train_dataloader()

    class Named(DataModule):
        def __init__(self, bs=4):
            self.bs = bs

        def train_dataloader(self):
            return Loading(self.bs).train_dataloader()

    saved, named = Saved(), Named()
    assert search(tmp_path, Plain(), saved).batch_size == saved.hparams.batch_size == 32
    assert search(tmp_path, Plain(), named, attribute="bs").batch_size == named.bs == 32


@pytest.mark.long
def test_s28_images_in_folders_are_searched_and_the_recipe_says_what_was_found(tmp_path):
    data = ImageClassificationData.from_folders(colour_folders(tmp_path / "train", each=10), num_workers=0)
    data.preprocessing = Preprocessing(input_size=(3, 32, 32))
    model = ImageClassifier("timm/test_resnet", pretrained=False)
    found = search(tmp_path, model, data, strategy="no_freeze")
    assert (found.batch_size, found.bound, data.batch_size) == (16, "data", 16)
    assert data.recipe()["from_folders"]["batch_size"] == 16
    assert model.head is None


@pytest.mark.long
def test_s28_both_at_once_find_the_rate_at_the_found_size(tmp_path):
    class Rated(Images):
        def __init__(self, learning_rate=0.01, **options):
            super().__init__(size=8, samples=24, **options)
            self.learning_rate = learning_rate

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    module = Rated()
    Images.steps.clear()
    result = tune(
        quiet(tmp_path), module, data_of(module, None), learning_rate={"num_training": 10}, batch_size="binsearch"
    )
    assert module.batch_size == result.batch_size.batch_size == 24
    assert module.learning_rate == result.learning_rate.suggestion
    assert [size for size, _ in Images.steps[-10:]] == [24] * 10
    assert str(result).splitlines() == [str(result.batch_size), str(result.learning_rate)]

    class Rising(Rated):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx) + 1.0 + self.global_step

    module = Rising()
    before = fingerprint(module)
    with pytest.raises(UsageError, match="did not fall"):
        tune(quiet(tmp_path), module, data_of(module, None), learning_rate=True, batch_size=True)
    assert fingerprint(module) == before


class Deaf(Images):
    def train_dataloader(self):
        self.batch_size = 5
        return super().train_dataloader()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 8, 8), torch.tensor(0))] * 64)


class Batched(Images):
    """A loader that is no DataLoader: its batches are looked at."""

    def train_dataloader(self):
        size = 3 if self.deaf else self.batch_size
        return [(torch.zeros(size, 3, 8, 8), torch.zeros(size).long())] * 4


@pytest.mark.long
def test_s28_streams_and_loaders_of_ones_own_are_searched(tmp_path):
    class Streaming(Images):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=self.batch_size)

    found = search(tmp_path, Streaming(), max_batch_size=64)
    assert (found.batch_size, found.bound, found.samples) == (64, "max_batch_size", None)
    module = Batched()
    module.deaf = False
    assert search(tmp_path, module, max_batch_size=16).batch_size == 16
    module.deaf = True
    with pytest.raises(UsageError, match="does not use batch_size"):
        search(tmp_path, module)

    class InBatches(Images):
        def train_dataloader(self):
            data = super().train_dataloader().dataset
            return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, False))

    with pytest.raises(UsageError, match="its batches have 3 samples where batch_size is 2"):
        search(tmp_path, InBatches(size=8))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("module", "loader", "options", "message"),
    [
        (Plain, True, {}, "passed to the trainer cannot be changed"),
        (Plain, False, {}, "no batch size that could be changed"),
        (lambda: Images(batch_size=None), False, {}, "batch_size is None"),
        (lambda: Deaf(size=8), False, {}, "does not use batch_size"),
        (Images, False, {"mode": "double"}, "binsearch"),
        (Images, False, {"max_batch_size": 0}, "at least 1"),
        (Images, False, {"max_batchsize": 8}, "did you mean 'max_batch_size'"),
    ],
)
def test_s28_a_batch_size_that_cannot_be_found_is_an_error_with_a_fix(tmp_path, module, loader, options, message):
    module = module()
    before = fingerprint(module)
    data = data_of(module, None, train=Loading().train_dataloader() if loader else None)
    with pytest.raises(UsageError, match=message):
        tune(quiet(tmp_path), module, data, batch_size=options or True)
    assert fingerprint(module) == before


# ---- nothing else changes


class Failing(Images):
    fails_at: int | None = None

    def training_step(self, batch, batch_idx):
        random.random(), torch.rand(1)
        if len(batch[0]) == self.fails_at:
            raise ZeroDivisionError("in the middle")
        return super().training_step(batch, batch_idx)


@pytest.mark.long
@pytest.mark.parametrize("fails_at", [None, 8])
def test_s28_a_search_leaves_no_trace_also_if_it_fails(tmp_path, monkeypatch, fails_at):
    monkeypatch.chdir(tmp_path)
    module, data = Failing(size=8), Loading()
    module.fails_at = fails_at
    module.default_memory_format = "channels_last"
    trainer = Trainer(max_epochs=1, enable_progress_bar=False)
    before = fingerprint(module, data, trainer), of_process(), of_files(tmp_path)
    if fails_at is not None:
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            tune(trainer, module, data, batch_size=True)
    else:
        found = tune(trainer, module, data, batch_size=True).batch_size
        # It stands in both: the module is asked first, and both are given what was found.
        assert found.batch_size == data.batch_size == module.batch_size == module.hparams.batch_size == 32
        data.batch_size = module.batch_size = module.hparams.batch_size = 4
    assert (fingerprint(module, data, trainer), of_process(), of_files(tmp_path)) == before


@pytest.mark.long
def test_s28_a_fit_after_a_search_has_the_bits_of_one_without(tmp_path):
    digests = []
    for searched in (True, False):
        torch.manual_seed(0)
        folder = tmp_path / str(searched)
        data = ImageClassificationData.from_folders(colour_folders(folder / "train", each=10), num_workers=0)
        data.preprocessing = Preprocessing(input_size=(3, 32, 32))
        model = ImageClassifier("timm/test_resnet", pretrained=False)
        trainer = quiet(tmp_path, output_dir=folder / "run")
        if searched:
            search(tmp_path, model, data, trainer, "no_freeze")
        data.batch_size = 16
        trainer.finetune(model, datamodule=data, strategy="no_freeze")
        digests.append(digest(model))
    assert digests[0] == digests[1]


# ---- memory


@pytest.mark.long
def test_the_peak_of_memory_is_seen_with_and_without_the_systems_help(tmp_path):
    (tmp_path / "self" / "clear_refs").mkdir(parents=True)  # a place where nothing can be reset
    (tmp_path / "self" / "status").symlink_to("/proc/self/status")
    for proc in (Path("/proc"), tmp_path):
        give_back_memory()
        before = memory_in_use()
        with MemoryWatch(proc) as watch:
            held = torch.ones(50_000_000)
            held += 1
            del held
        assert 180e6 < watch.peak - before < 260e6


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


PROC = {
    "meminfo": "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n",
    "self/status": "VmPeak:  3000 kB\nVmRSS:  1000 kB\n",
    "self/limits": "Limit   Soft Limit  Hard Limit  Units\nMax address space   unlimited   unlimited   bytes\n",
}


def test_the_machine_control_groups_and_ulimit_bound_memory(tmp_path):
    tree(tmp_path / "proc", {**PROC, "self/cgroup": "0::/outer/inner\n"})
    assert memory_limits(tmp_path / "proc", tmp_path / "none") == [("this machine's memory", 8000 * 1024)]

    tree(
        tmp_path / "v2",
        {
            "outer/memory.max": "5000\n",
            "outer/memory.current": "1500\n",
            "outer/memory.stat": "anon 100\ninactive_file 500\n",
            "outer/inner/memory.max": "max\n",
            "outer/inner/memory.high": "4500\n",
            "outer/inner/memory.current": "1000\n",
        },
    )
    limits = dict(memory_limits(tmp_path / "proc", tmp_path / "v2"))
    assert sorted(limits.values()) == [3500, 4000, 8000 * 1024]
    assert limits[f"the control group {tmp_path / 'v2' / 'outer' / 'inner'}"] == 3500


def test_version_1_of_control_groups_and_an_address_space_bound_memory(tmp_path):
    limited = PROC["self/limits"].replace("unlimited   unlimited", "4096000   unlimited")
    tree(tmp_path / "proc", {**PROC, "self/limits": limited, "self/cgroup": "4:cpu:/x\n3:memory:/not/seen/here\n"})
    tree(
        tmp_path / "v1" / "memory",
        {
            "memory.limit_in_bytes": "6000",
            "memory.usage_in_bytes": "2000",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
        },
    )
    limits = memory_limits(tmp_path / "proc", tmp_path / "v1")
    assert [limit.free for limit in limits] == [8000 * 1024, 4050, 4096000 - 3000 * 1024]
    (tmp_path / "v1" / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert len(memory_limits(tmp_path / "proc", tmp_path / "v1")) == 2


def test_limits_of_this_process_are_read():
    limits = memory_limits()
    assert all(limit.free > 0 for limit in limits)
    assert isinstance(limits[0].free, int)


def test_a_lack_of_memory_has_its_own_exit_code():
    assert OutOfMemoryError.exit_code == 81
