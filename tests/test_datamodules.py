"""Data modules: when each of their methods is called, with what, and what survives a resume."""

from __future__ import annotations

import pytest
import torch
from small import Net, loaders, net
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from flashtask import Callback, DataModule, Trainer, read_checkpoint
from flashtask.core.errors import UsageError

#: stage -> the loaders that it asks for
STAGES = {
    "fit": ["train_dataloader", "val_dataloader"],
    "validate": ["val_dataloader"],
    "test": ["test_dataloader"],
    "predict": ["predict_dataloader"],
}
SAMPLES = 24


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**{"max_epochs": 1, "num_sanity_val_steps": 0, **options})


def loader(shuffle=False, **options):
    return DataLoader(loaders(samples=SAMPLES)[0].dataset, batch_size=8, shuffle=shuffle, **options)


class Data(DataModule):
    """Writes down, in order, what it is asked for."""

    def __init__(self):
        self.told = []

    def prepare_data(self):
        self.told.append("prepare_data")

    def setup(self, stage):
        self.told.append(f"setup {stage}")

    def teardown(self, stage):
        self.told.append(f"teardown {stage}")

    def _loader(self, name):
        self.told.append(name)
        return loader()

    def train_dataloader(self):
        return self._loader("train_dataloader")

    def val_dataloader(self):
        return self._loader("val_dataloader")

    def test_dataloader(self):
        return self._loader("test_dataloader")

    def predict_dataloader(self):
        return self._loader("predict_dataloader")

    def on_exception(self, exception):
        self.told.append(f"on_exception {exception}")


class Predicting(Net):
    """A net whose every step can be made to fail."""

    fails = False

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.fails:
            raise RuntimeError("broken")
        return batch

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("stage", STAGES)
def test_s79_s80_s81_s82_a_stage_prepares_sets_up_asks_for_its_loaders_and_tears_down(tmp_path, stage):
    data = Data()
    getattr(quiet(tmp_path, max_epochs=2), stage)(Predicting(), datamodule=data)
    assert data.told == ["prepare_data", f"setup {stage}", *STAGES[stage], f"teardown {stage}"]
    assert data.trainer is None


@pytest.mark.parametrize("stage", STAGES)
def test_s81_s84_after_an_error_on_exception_and_teardown_are_called_in_every_verb(tmp_path, stage):
    data, module = Data(), Predicting()
    module.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        getattr(quiet(tmp_path), stage)(module, datamodule=data)
    assert data.told[-2:] == ["on_exception broken", f"teardown {stage}"]
    assert data.told.count(f"teardown {stage}") == 1


def test_s84_on_exception_hears_of_an_interruption_too(tmp_path):
    class Interrupted(Net):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    data = Data()
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path).fit(Interrupted(), data)
    assert "on_exception " in data.told


def test_s13_s82_a_stage_whose_loader_is_not_written_has_no_data(tmp_path):
    class OnlyTraining(DataModule):
        def train_dataloader(self):
            return loader()

    trainer = quiet(tmp_path)
    trainer.fit(net(), OnlyTraining())
    assert "val_loss" not in trainer.callback_metrics
    for stage in ("validate", "test", "predict"):
        with pytest.raises(UsageError, match=f"nothing to {stage} on"):
            getattr(trainer, stage)(net(), datamodule=OnlyTraining())
    with pytest.raises(UsageError, match="nothing to train on"):
        quiet(tmp_path, output_dir=tmp_path / "other").fit(net(), DataModule())


def test_s82_several_loaders_of_a_stage_are_gone_through_one_after_the_other(tmp_path):
    class Several(DataModule):
        def test_dataloader(self):
            return [loader(), loader()]

    seen = []

    class Numbered(Net):
        def test_step(self, batch, batch_idx, dataloader_idx):
            seen.append((dataloader_idx, batch_idx))

    quiet(tmp_path).test(Numbered(), datamodule=Several())
    assert seen == [(number, index) for number in (0, 1) for index in (0, 1, 2)]


def test_s82_the_data_of_the_fit_serves_later_stages_and_other_data_takes_its_place(tmp_path):
    data, other, trainer = Data(), Data(), quiet(tmp_path)
    trainer.fit(net(), data)
    data.told.clear()
    trainer.test()
    assert "test_dataloader" in data.told
    trainer.test(datamodule=other)
    assert "test_dataloader" in other.told
    assert data.told.count("test_dataloader") == 1


def test_s80_data_is_set_up_before_the_module_and_the_callbacks(tmp_path):
    order = []

    class Ordered(Data):
        def setup(self, stage):
            order.append("data")

    class Late(Net):
        def setup(self, stage):
            order.append("module")

    class Latest(Callback):
        def setup(self, trainer, module, stage):
            order.append("callback")

    quiet(tmp_path, callbacks=Latest()).fit(Late(), Ordered())
    assert order == ["data", "module", "callback"]


def test_s85_module_data_and_callbacks_hear_the_same_stage_names(tmp_path):
    heard = []

    class Watch(Callback):
        def setup(self, trainer, module, stage):
            heard.append(("callback", stage))

        def teardown(self, trainer, module, stage):
            heard.append(("callback down", stage))

    class Hearing(Predicting):
        def setup(self, stage):
            heard.append(("module", stage))

        def teardown(self, stage):
            heard.append(("module down", stage))

    module, data, trainer = Hearing(), Data(), quiet(tmp_path, callbacks=Watch())
    for stage in ("fit", "validate", "test", "predict"):
        heard.clear()
        getattr(trainer, stage)(module, datamodule=data)
        assert {stage for _, stage in heard} == {stage}
        assert sorted(who for who, _ in heard) == ["callback", "callback down", "module", "module down"]


class Sums(Net):
    """The samples of each training batch, by the sums of their numbers."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        self.epochs[-1] += [round(float(row.sum()), 4) for row in batch[0]]
        return super().training_step(batch, batch_idx)


def order_of(tmp_path, train_loader, **options):
    """For each of three epochs, the samples in the order in which they were trained on."""
    module = Sums()
    quiet(tmp_path, max_epochs=3, **options).fit(module, train_loader)
    return module.epochs


def test_s83_a_loader_that_shuffles_is_shuffled_anew_in_every_epoch(tmp_path):
    epochs = order_of(tmp_path, loader(shuffle=True))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_s83_a_loader_that_does_not_shuffle_keeps_the_order_of_its_dataset(tmp_path):
    plain = loader()
    own = [round(float(row.sum()), 4) for row in plain.dataset.tensors[0]]
    assert order_of(tmp_path, plain) == [own] * 3


def test_s83_a_sampler_of_ones_own_is_kept(tmp_path):
    only_two = WeightedRandomSampler([1.0, 1.0] + [0.0] * (SAMPLES - 2), 16)
    two = {round(float(row.sum()), 4) for row in loader().dataset.tensors[0][:2]}
    assert {sample for epoch in order_of(tmp_path, loader(sampler=only_two)) for sample in epoch} == two


@pytest.mark.parametrize("shuffled", [{"shuffle": True}, {"sampler": RandomSampler(range(SAMPLES), True, SAMPLES)}])
def test_s83_overfitting_turns_a_shuffle_off(tmp_path, shuffled):
    first = [round(float(row.sum()), 4) for row in loader().dataset.tensors[0][:16]]
    assert order_of(tmp_path, loader(**shuffled), overfit_batches=2) == [first] * 3


def test_s83_overfitting_says_where_it_cannot_turn_a_shuffle_off(tmp_path, capsys):
    class Own(DataLoader):
        pass

    order_of(tmp_path, Own(loader().dataset, batch_size=8, shuffle=True), overfit_batches=2)
    assert "your own loader keeps its order" in capsys.readouterr().err


class Moving:
    """The hooks around moving a batch; the batch becomes a dictionary on the way."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.told.append(("before", type(batch), dataloader_idx))
        return {"inputs": batch[0], "targets": batch[1]}

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.told.append(("move", type(batch), device, dataloader_idx))
        return {name: values.to(device) for name, values in batch.items()}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.told.append(("after", type(batch), dataloader_idx))
        return batch["inputs"], batch["targets"]


def moves(dataloader_idx):
    cpu = torch.device("cpu")
    return [("before", list, dataloader_idx), ("move", dict, cpu, dataloader_idx), ("after", dict, dataloader_idx)]


def test_s84_the_transfer_hooks_of_a_datamodule_change_each_batch_of_each_loader(tmp_path):
    class MovingData(Moving, Data):
        def __init__(self):
            self.told = []

        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return [loader(), loader()]

        prepare_data, setup, teardown = DataModule.prepare_data, DataModule.setup, DataModule.teardown

    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            assert type(batch) is tuple
            super().validation_step(batch, batch_idx)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            raise AssertionError("the data module's own comes first")

    data = MovingData()
    quiet(tmp_path, limit_train_batches=1, limit_val_batches=1).fit(Two(), data)
    assert data.told == [*moves(0), *moves(0), *moves(1)]


@pytest.mark.parametrize("given", [True, False])
def test_s84_a_module_may_have_the_transfer_hooks_for_its_own_loaders_or_given_ones(tmp_path, given):
    class Own(Moving, Net):
        def __init__(self):
            super().__init__()
            self.told = []

        def train_dataloader(self):
            return loader()

    module = Own()
    quiet(tmp_path, limit_train_batches=1).fit(module, *([loader()] if given else []))
    assert module.told == moves(0)


def test_s84_a_transfer_hook_may_leave_the_rest_to_the_one_it_overrides(tmp_path):
    class Own(Net):
        moved = 0

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.moved += 1
            batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
            return super().on_after_batch_transfer(super().on_before_batch_transfer(batch, 0), 0)

    class Moved(Data):
        moved = 0

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.moved += 1
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    module, data = Own(), Moved()
    quiet(tmp_path, limit_train_batches=2).fit(module, loader())
    quiet(tmp_path, output_dir=tmp_path / "other", limit_train_batches=2, limit_val_batches=1).fit(Own(), data)
    assert (module.moved, data.moved) == (2, 3)


def test_s79_a_module_with_loaders_of_its_own_prepares_its_data_itself(tmp_path):
    class Own(Net):
        told = ()

        def prepare_data(self):
            self.told += ("prepare_data",)

        def train_dataloader(self):
            self.told += ("train_dataloader",)
            return loader()

    module = Own()
    quiet(tmp_path).fit(module)
    assert module.told == ("prepare_data", "train_dataloader")


def test_s84_the_state_of_a_datamodule_survives_a_resume(tmp_path):
    class Counting(Data):
        batches = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.batches += 1
            return batch

        def val_dataloader(self):
            return None

        def state_dict(self):
            return {"batches": self.batches, "history": torch.arange(self.batches)}

        def load_state_dict(self, state):
            assert torch.equal(state["history"], torch.arange(state["batches"]))
            self.batches = state["batches"]

    first, path = Counting(), tmp_path / "run" / "last.ckpt"
    quiet(tmp_path).fit(net(), first)
    assert read_checkpoint(path)["datamodule"]["batches"] == first.batches == 3
    resumed = Counting()
    quiet(tmp_path, max_epochs=3).fit(net(), resumed, ckpt_path=path)
    assert resumed.batches == 9


def test_s84_a_state_that_no_checkpoint_can_hold_is_told_by_its_key(tmp_path):
    class Holding(Data):
        def state_dict(self):
            return {"open": object()}

    with pytest.raises(UsageError, match="datamodule key 'open'"):
        quiet(tmp_path).fit(net(), Holding())
