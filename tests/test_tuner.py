"""`Tuner`, which has the finders of `trainer.tune` under the names of Lightning 2."""

from __future__ import annotations

import pytest
from small import Net, loaders, quiet

from flashtask import DataModule, Tuner
from flashtask.core.errors import UnknownNameError, UsageError

STEPS = {"num_training": 20, "min_lr": 1e-4}


def test_lr_find_gives_the_curve_and_sets_the_rate(tmp_path):
    module, train = Net(), loaders(32)[0]
    found = Tuner(quiet(tmp_path)).lr_find(module, train_dataloaders=train, **STEPS)
    assert module.hparams.learning_rate == found.suggestion() == found.curve.suggestion
    assert found.results == {"lr": list(found.curve.rates), "loss": list(found.curve.losses)}
    assert found.results["lr"][0] == pytest.approx(1e-4)
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_lr_find_leaves_the_rate_as_it_is_where_it_is_told_to(tmp_path):
    module, train = Net(), loaders(32)[0]
    found = Tuner(quiet(tmp_path)).lr_find(module, train, update_attr=False, attr_name="learning_rate", **STEPS)
    assert module.hparams.learning_rate == 1e-2 != found.suggestion()
    with pytest.raises(UsageError, match="no learning rate"):
        Tuner(quiet(tmp_path)).lr_find(module, train, attr_name="rate", **STEPS)


class Data(DataModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        dataset = loaders(64)[0].dataset
        return type(loaders(64)[0])(dataset, batch_size=self.batch_size, shuffle=True)


def test_scale_batch_size_gives_the_size_and_sets_it(tmp_path):
    data = Data()
    found = Tuner(quiet(tmp_path)).scale_batch_size(Net(), datamodule=data, max_val=16)
    assert data.batch_size == found == 16


def test_an_option_of_another_version_is_answered(tmp_path):
    with pytest.raises(UnknownNameError, match="steps_per_trial"):
        Tuner(quiet(tmp_path)).scale_batch_size(Net(), steps_per_trial=3)
