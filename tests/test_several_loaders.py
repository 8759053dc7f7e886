"""Several loaders for training and evaluation, and what loaders may be and do otherwise."""

from __future__ import annotations

import signal

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import SignalAt, state_digest
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from flashtask import Callback, CombinedLoader, DataModule, FitLoop, Module, Trainer, seeded
from flashtask.core.errors import UnknownNameError, UsageError


def quiet(folder, **options) -> Trainer:
    options = {"max_epochs": 2, "seed": 3, "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(output_dir=folder, num_sanity_val_steps=0, **options)


def numbers(first: int, count: int, batch_size: int = 2, shuffle: bool = False) -> DataLoader:
    data = TensorDataset(torch.arange(first, first + count).float())
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


def plain(batch):
    """A batch in plain numbers."""
    if isinstance(batch, dict):
        return {name: plain(part) for name, part in batch.items()}
    if isinstance(batch, torch.Tensor):
        return [int(one) for one in batch]
    if batch is None:
        return None
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        return plain(batch[0])
    return type(batch)(plain(part) for part in batch)


class Seen(Module):
    """Keeps what its steps are given; learns next to nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(plain(batch))
        return self.weight.square()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, plain(batch)))

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return dataloader_idx, plain(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def steps(folder, data, **options):
    module = Seen()
    quiet(folder, **{"max_epochs": 1, **options}).fit(module, data)
    return module.seen


LONG, SHORT = (0, 6), (10, 4)


def test_the_modes(tmp_path):
    def given(mode):
        return CombinedLoader({"a": numbers(*LONG), "b": numbers(*SHORT)}, mode)

    assert steps(tmp_path / "min", given("min_size")) == [
        {"a": [0, 1], "b": [10, 11]},
        {"a": [2, 3], "b": [12, 13]},
    ]
    assert steps(tmp_path / "max", given("max_size"))[2:] == [{"a": [4, 5], "b": None}]
    assert steps(tmp_path / "cycle", given("max_size_cycle"))[2:] == [{"a": [4, 5], "b": [10, 11]}]
    assert steps(tmp_path / "one", given("sequential")) == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13]]
    assert [len(given(mode)) for mode in ("min_size", "max_size", "max_size_cycle", "sequential")] == [2, 3, 3, 5]
    assert [plain(batch) for batch in given("min_size")] == steps(tmp_path / "min2", given("min_size"))
    with pytest.raises(UnknownNameError, match="max_sice"):
        given("max_sice")
    with pytest.raises(UsageError, match="needs a loader"):
        CombinedLoader([])


def test_structures(tmp_path):
    a, b, c = numbers(0, 4), numbers(10, 4), numbers(20, 4)
    assert steps(tmp_path / "list", [a, b])[0] == [[0, 1], [10, 11]]
    assert steps(tmp_path / "tuple", (a, b))[0] == ([0, 1], [10, 11])
    assert steps(tmp_path / "dict", {"x": a, "y": b})[0] == {"x": [0, 1], "y": [10, 11]}
    assert steps(tmp_path / "nested", {"x": a, "more": [b, {"z": c}]})[0] == {
        "x": [0, 1],
        "more": [[10, 11], {"z": [20, 21]}],
    }
    assert steps(tmp_path / "inside", [{"x": a}, (b, c)])[0] == [{"x": [0, 1]}, ([10, 11], [20, 21])]
    assert steps(tmp_path / "batches", {"x": a, "y": [torch.tensor([7, 8])]})[0] == {"x": [0, 1], "y": [7, 8]}


def test_lists_of_batches_are_one_loader(tmp_path):
    batches = [{"x": torch.tensor([1])}, {"x": torch.tensor([2])}]
    assert steps(tmp_path / "a", batches) == [{"x": [1]}, {"x": [2]}]
    assert steps(tmp_path / "b", [(torch.tensor([1]), torch.tensor([2]))]) == [([1], [2])]
    detection = [([torch.tensor([1]), torch.tensor([2])], [{"boxes": torch.tensor([3])}])]
    assert steps(tmp_path / "c", detection) == [([[1], [2]], {"boxes": [3]})]
    assert steps(tmp_path / "d", [{"views": [torch.tensor([1]), torch.tensor([2])]}]) == [{"views": [[1], [2]]}]


def test_what_is_wrong_in_a_structure_is_told(tmp_path):
    for wrong in ({"a": numbers(0, 4), "b": TensorDataset(torch.zeros(2))}, {"a": torch.zeros(3)}, {}):
        with pytest.raises(UsageError, match="the training data must be a DataLoader"):
            quiet(tmp_path).fit(Seen(), wrong)


def test_limits_and_overfitting(tmp_path):
    data = {"a": numbers(0, 20, shuffle=True), "b": numbers(100, 4, shuffle=True)}
    assert len(steps(tmp_path / "a", data, limit_train_batches=3)) == 3
    assert len(steps(tmp_path / "b", data, limit_train_batches=0.5)) == 5
    assert steps(tmp_path / "c", data, overfit_batches=2) == [
        {"a": [0, 1], "b": [100, 101]},
        {"a": [2, 3], "b": [102, 103]},
    ]


def test_orders_come_from_the_seed_and_differ_between_loaders_epochs_and_repetitions(tmp_path):
    def run(folder, **options):
        data = {"a": numbers(0, 16, shuffle=True), "b": numbers(0, 8, shuffle=True)}
        return steps(tmp_path / folder, data, max_epochs=2, **options)

    first = run("a")
    torch.manual_seed(5)
    assert run("b") == first
    assert run("c", seed=4) != first
    orders = {name: [number for batch in first for number in batch[name]] for name in ("a", "b")}
    for name, size in (("a", 16), ("b", 8)):
        passes = [tuple(orders[name][at : at + size]) for at in range(0, len(orders[name]), size)]
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert len(set(passes)) == len(passes)


class Augmented(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(4, generator=generator)
        return inputs + 0.1 * torch.randn(4), (inputs.sum() > 0).long()


class Pairs(Net):
    def training_step(self, batch, batch_idx):
        parts = [batch["a"], batch["b"]] if isinstance(batch, dict) else [batch]
        inputs, targets = (torch.cat(several) for several in zip(*parts, strict=True))
        return super().training_step((inputs, targets), batch_idx)


def pairs(seed=1):
    torch.manual_seed(seed)
    return Pairs()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "sequential"])
@pytest.mark.parametrize("count", [1, 9, 13])
def test_a_run_that_is_stopped_in_an_epoch_continues_with_the_same_bits(tmp_path, mode, count):
    def data():
        more = DataLoader(seeded(Augmented()), batch_size=4, shuffle=True)
        return CombinedLoader({"a": loaders()[0], "b": more}, mode)

    quiet(tmp_path / "a", val_check_interval=2).fit(pairs(), data(), loaders()[1])
    stop = SignalAt("train_batch_end", count if mode == "sequential" else count % 8 + 1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        quiet(tmp_path / "b", callbacks=[stop], val_check_interval=2).fit(pairs(), data(), loaders()[1])
    trainer = quiet(tmp_path / "b", val_check_interval=2)
    trainer.fit(pairs(9), data(), loaders()[1], ckpt_path=tmp_path / "b" / "last.ckpt")
    assert state_digest(tmp_path / "b" / "last.ckpt") == state_digest(tmp_path / "a" / "last.ckpt")


class Counting(IterableDataset):
    def __init__(self, count=None):
        self.count = count

    def __iter__(self):
        number = 0
        while self.count is None or number < self.count:
            yield torch.tensor(float(number))
            number += 1


def test_loaders_without_a_length(tmp_path):
    def stream(count=None):
        return DataLoader(Counting(count), batch_size=2)

    assert steps(tmp_path / "a", {"a": stream(6), "b": numbers(10, 4)}) == [
        {"a": [0, 1], "b": [10, 11]},
        {"a": [2, 3], "b": [12, 13]},
        {"a": [4, 5], "b": [10, 11]},
    ]
    endless = CombinedLoader({"a": stream(), "b": numbers(10, 4)}, "min_size")
    assert len(steps(tmp_path / "b", endless)) == 2
    assert len(steps(tmp_path / "c", {"a": stream(), "b": numbers(10, 4)}, max_steps=7, max_epochs=-1)) == 7


def test_a_dictionary_of_loaders_for_evaluation(tmp_path):
    trainer, module = quiet(tmp_path), Seen()
    data = {"a": numbers(0, 2), "b": numbers(10, 2)}
    expected = [(0, [0, 1]), (1, [10, 11])]
    trainer.validate(module, data)
    trainer.test(module, list(data.values()))
    assert module.evaluated == expected * 2
    assert trainer.predict(module, CombinedLoader(data, "sequential")) == [[expected[0]], [expected[1]]]
    assert trainer.predict(module, CombinedLoader(data)) == [(0, {"a": [0, 1], "b": [10, 11]})]


class Logs(Seen):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", float(batch[0].mean()), on_step=True, on_epoch=True)
        self.log(f"own_{dataloader_idx}", float(dataloader_idx), add_dataloader_idx=False)

    test_step = validation_step

    def on_validation_epoch_end(self):
        self.log("d", 5.0)

    on_test_epoch_end = on_validation_epoch_end


def test_names_of_values_with_several_loaders(tmp_path):
    trainer = quiet(tmp_path)
    first, second = trainer.test(Logs(), {"a": numbers(0, 4), "b": numbers(10, 4)})
    assert first == {"loss_epoch/dataloader_idx_0": 1.5, "own_0": 0.0, "d": 5.0}
    assert second == {"loss_epoch/dataloader_idx_1": 11.5, "own_1": 1.0, "d": 5.0}
    assert trainer.test(Logs(), numbers(0, 4)) == [{"loss_epoch": 1.5, "own_0": 0.0, "d": 5.0}]


def test_a_value_of_the_end_of_a_pass_can_be_monitored(tmp_path):
    from flashtask import ModelCheckpoint

    checkpoint = ModelCheckpoint(monitor="d", mode="max")
    quiet(tmp_path, callbacks=[checkpoint]).fit(Logs(), numbers(0, 4), [numbers(0, 4), numbers(10, 4)])
    assert checkpoint.best_model_score == 5.0


def test_loaders_are_made_again_every_so_many_epochs(tmp_path):
    class Data(DataModule):
        def __init__(self):
            self.made = []

        def train_dataloader(self):
            self.made.append(("train", self.trainer.current_epoch))
            return numbers(100 * self.trainer.current_epoch, 2)

        def val_dataloader(self):
            self.made.append(("val", self.trainer.current_epoch))
            return numbers(100 * self.trainer.current_epoch + 50, 2)

    data, module = Data(), Seen()
    trainer = quiet(tmp_path, max_epochs=5, reload_dataloaders_every_n_epochs=2)
    trainer.fit(module, datamodule=data)
    assert data.made == [(part, epoch) for epoch in (0, 2, 4) for part in ("train", "val")]
    assert [batch[0] for batch in module.seen] == [0, 0, 200, 200, 400]
    assert [batch[0] for _, batch in module.evaluated] == [50, 50, 250, 250, 450]
    resumed, again = Data(), Seen()
    trainer = quiet(tmp_path, max_epochs=7, reload_dataloaders_every_n_epochs=2)
    trainer.fit(again, datamodule=resumed, ckpt_path=tmp_path / "last.ckpt")
    assert [batch[0] for batch in again.seen] == [500, 600]
    once = Data()
    quiet(tmp_path / "once", max_epochs=3).fit(Seen(), datamodule=once)
    assert once.made == [("train", 0), ("val", 0)]


def test_a_data_module_from_datasets(tmp_path):
    first, second = (TensorDataset(torch.arange(at, at + 8).float()) for at in (0, 10))
    data = DataModule.from_datasets(first, [first, second], {"x": second}, second, batch_size=4)
    trainer, module = quiet(tmp_path, max_epochs=1), Seen()
    trainer.fit(module, datamodule=data)
    assert sorted(number for batch in module.seen for number in batch) == list(range(8))
    assert module.seen[0] != [0, 1, 2, 3]
    assert [loader for loader, _ in module.evaluated] == [0, 0, 1, 1]
    assert trainer.predict(module, datamodule=data) == [(0, [10, 11, 12, 13]), (0, [14, 15, 16, 17])]
    module.evaluated.clear()
    trainer.test(module, datamodule=data)
    assert module.evaluated == [(0, [10, 11, 12, 13]), (0, [14, 15, 16, 17])]

    class Own(DataModule):
        def __init__(self, name):
            self.name = name

    own = Own.from_datasets(train_dataset={"a": first, "b": Counting(3)}, name="mine")
    assert (type(own), own.name, own.val_dataloader()) == (Own, "mine", None)
    assert set(own.train_dataloader()) == {"a", "b"}
    with pytest.raises(UsageError, match="missing a required argument: 'name'"):
        Own.from_datasets(first)


def not_seven(samples):
    kept = [sample for sample in samples if int(sample[0]) != 7]
    return torch.stack([sample[0] for sample in kept]) if kept else None


@pytest.mark.parametrize(("accumulate", "expected"), [(1, 3), (2, 2), (4, 1)])
def test_a_batch_that_is_none_is_left_out(tmp_path, accumulate, expected):
    class Ends(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            numbers.append(batch_idx)

    numbers, module = [], Seen()
    data = DataLoader(TensorDataset(torch.tensor([7.0, 5.0, 6.0, 3.0, 7.0])), batch_size=1, collate_fn=not_seven)
    trainer = quiet(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[Ends()])
    trainer.fit(module, data, data)
    assert module.seen == [[5], [6], [3]]
    assert numbers == [1, 2, 3]
    assert [batch for _, batch in module.evaluated] == [[5], [6], [3]]
    assert trainer.global_step == expected
    assert trainer.current_epoch == 1


def test_a_batch_sampler_hears_of_the_epoch(tmp_path):
    class Batches(BatchSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    epochs = []
    data = TensorDataset(torch.arange(8).float())
    loader = DataLoader(data, batch_sampler=Batches(RandomSampler(data), 4, drop_last=False))
    quiet(tmp_path, max_epochs=3).fit(Seen(), loader)
    assert epochs == [0, 1, 2]
    epochs.clear()
    quiet(tmp_path / "b", max_epochs=2).fit(Seen(), {"a": loader, "b": numbers(0, 2)})
    assert sorted(set(epochs)) == [0, 1]


def test_numbers_that_are_zero_or_without_an_end(tmp_path):
    before = net()
    trainer = quiet(tmp_path / "none", max_epochs=0)
    weights = digest(before)
    result = trainer.fit(before, *loaders())
    assert (trainer.global_step, trainer.current_epoch, digest(before), result.num_epochs) == (0, 0, weights, 0)
    assert not list((tmp_path / "none").glob("*.ckpt"))
    quiet(tmp_path / "best", max_epochs=0).finetune(before, *loaders(), strategy="no_freeze")

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 3

    trainer = quiet(tmp_path / "stop", max_epochs=-1, min_epochs=0, min_steps=0, callbacks=[Stop()])
    trainer.fit(net(), *loaders())
    assert trainer.global_step == 21
    assert trainer.estimated_stepping_batches == float("inf")


def test_a_frequency_of_zero_writes_nothing_on_the_way(tmp_path):
    from flashtask import ModelCheckpoint

    for name, options in (("a", {"every_n_epochs": 0}), ("b", {"every_n_train_steps": 0})):
        checkpoint = ModelCheckpoint(save_last=False, **options)
        quiet(tmp_path / name, callbacks=[checkpoint]).fit(net(), *loaders())
        assert not list((tmp_path / name).glob("*.ckpt"))


def test_the_newest_are_kept_with_monitor_step_or_epoch(tmp_path):
    from flashtask import ModelCheckpoint

    for place, expected in (("step", [21.0, 14.0]), ("epoch", [2.0, 1.0])):
        checkpoint = ModelCheckpoint(monitor=place, save_top_k=2)
        quiet(tmp_path / place, max_epochs=3, callbacks=[checkpoint]).fit(net(), *loaders())
        assert list(checkpoint.best_k_models.values()) == expected
    oldest = ModelCheckpoint(monitor="step", mode="min", every_n_train_steps=2)
    quiet(tmp_path / "oldest", max_epochs=1, callbacks=[oldest]).fit(net(), *loaders())
    assert oldest.best_model_score == 2.0


class Two(Module):
    """Two optimizers with frequencies; notes who trains on which batch."""

    def __init__(self, *frequencies):
        super().__init__()
        self.parts = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in frequencies])
        self.frequencies, self.turns = frequencies, []

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.turns.append((batch_idx, optimizer_idx))
        return self.parts[optimizer_idx](batch[0][:, None]).square().mean()

    def configure_optimizers(self):
        made = []
        for part, frequency in zip(self.parts, self.frequencies, strict=True):
            optimizer = torch.optim.SGD(part.parameters(), lr=0.01)
            rate = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}
            config = {"optimizer": optimizer, "lr_scheduler": rate}
            made.append(config if frequency is None else {**config, "frequency": frequency})
        return made


def test_optimizers_with_frequencies_take_turns_by_batches(tmp_path):
    module = Two(2, 1)
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(module, numbers(0, 10))
    assert module.turns == [(0, 0), (1, 0), (2, 1), (3, 0), (4, 0)] * 2
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [0.01 * 0.5**8, 0.01 * 0.5**2]
    for wrong in ((1, None), (1, 0)):
        with pytest.raises(UsageError, match="frequencies of the optimizers"):
            quiet(tmp_path / "wrong").fit(Two(*wrong), numbers(0, 10))


def test_a_loop_of_ones_own_advances_once_for_each_batch(tmp_path):
    from flashtask import TrainingEpochLoop

    class Counted(TrainingEpochLoop):
        def advance(self, *arguments):
            calls.append("advance")
            super().advance(*arguments)

        def on_advance_end(self):
            super().on_advance_end()
            calls.append(self.done)

    calls = []
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit_loop = FitLoop()
    trainer.fit_loop.replace(epoch_loop=Counted)
    trainer.fit(Seen(), numbers(0, 8))
    assert calls == ["advance", False] * 3 + ["advance", True]
