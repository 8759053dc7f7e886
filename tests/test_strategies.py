"""Strategies of distribution and what they come to with accelerator, devices, precision and plugins."""

from __future__ import annotations

import pytest
import torch
from small import loaders, net

from flashtask import Trainer
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.device_plan import check_device_plan, resolve_device_plan
from flashtask.trainer.devices.accelerators import CPUAccelerator
from flashtask.trainer.devices.precision import MixedPrecision, Precision
from flashtask.trainer.distribution.process_strategies import STRATEGIES, SingleDevice, Strategy, resolve_strategy
from flashtask.trainer.finetuning.strategies import Finetuning, Stage

NOTHING = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "precision": None, "plugins": None}


class MyAccelerator(CPUAccelerator):
    """Four devices that all compute on the CPU."""

    name = "mine"

    def device_count(self):
        return 4


class MyPrecision(Precision):
    """Float32 under a name of its own."""


class MyStrategy(Strategy):
    """One process, under a name of its own."""

    name = "mine"


class Wide(Strategy):
    """Any number of devices, of which this process has the third."""

    name = "wide"
    most_devices = None
    local_rank = 2


def placed(**given):
    return resolve_device_plan(**{**NOTHING, "accelerator": "cpu", **given}, default_precision="32")


# ---- names


def test_s119_the_strategies_that_are_there_are_listed(capsys):
    for name in STRATEGIES.names():
        print(name)
    assert {"single", "ddp", "ddp_spawn", "ddp_find_unused_parameters"} <= set(capsys.readouterr().out.split())
    assert STRATEGIES.keys() == STRATEGIES.names()


@pytest.mark.parametrize("name", [None, "auto", "single", "single_device"])
def test_s119_one_process_has_several_spellings(name):
    assert type(resolve_strategy(name)) is SingleDevice


@pytest.mark.parametrize(
    ("name", "words", "fix"),
    [
        ("ddp_sharded_find_unused_parameters_false", "there is no FairScale support", 'strategy="fsdp"'),
        ("deepspeed_stage_3_offload_nvme", "there is no DeepSpeed support", 'strategy="fsdp"'),
        ("horovod", "there is no Horovod support", 'strategy="ddp"'),
        ("dp", "several devices in one process", 'strategy="ddp"'),
        ("tpu_spawn_debug", "there is no TPU support", 'strategy="ddp"'),
        ("singel", "no strategy named 'singel'", "did you mean 'single'"),
        ("freze", "about devices and processes", "trainer.finetune(model, ..., strategy='freeze')"),
        ("juggling", "no strategy named 'juggling'", "choose one of: "),
    ],
)
def test_s119_a_strategy_that_is_not_there_says_what_to_use(name, words, fix):
    with pytest.raises(UnknownNameError) as caught:
        resolve_strategy(name)
    assert words in str(caught.value)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "strategy",
    ["freeze", "freeze_unfreeze:5", ("freeze_unfreeze", 5), Finetuning([Stage(0, 0)])],
)
def test_s119_a_finetuning_strategy_is_shown_its_place(strategy):
    with pytest.raises(UsageError, match="is for finetuning") as caught:
        resolve_strategy(strategy)
    assert "trainer.finetune(model, ..., strategy=" in caught.value.fix


@pytest.mark.parametrize(
    ("wrong", "fix"), [(3, "MyStrategy()"), (SingleDevice, "SingleDevice()"), ((), "MyStrategy()")]
)
def test_s119_what_is_no_strategy_is_told(wrong, fix):
    with pytest.raises(UsageError) as caught:
        resolve_strategy(wrong)
    assert fix in caught.value.fix


def test_s119_a_strategy_of_ones_own_can_be_registered():
    STRATEGIES.register("mine", MyStrategy)
    try:
        assert "mine" in STRATEGIES.names()
        assert isinstance(placed(strategy="mine").strategy, MyStrategy)
    finally:
        STRATEGIES.remove("mine")


# ---- one process


def test_one_process_is_the_first_and_only_one():
    strategy, module, value = SingleDevice(), torch.nn.Linear(1, 1), torch.tensor(3.0)
    assert (strategy.world_size, strategy.global_rank, strategy.local_rank) == (1, 0, 0)
    assert strategy.is_global_zero
    step = module.forward
    assert strategy.setup(module) is None
    assert strategy.wrap_step(module, step) is step
    assert strategy.gather(value) == [value]
    assert all(strategy.reduce(value, how) is value for how in ("mean", "sum", "max", "min"))
    with strategy.launch():
        pass
    strategy.barrier("start")
    with pytest.raises(UnknownNameError, match="no way to reduce named 'maximum'"):
        strategy.reduce(value, "maximum")


# ---- the device plan


def test_s118_names_come_to_objects():
    place = placed(precision="bf16-mixed")
    assert type(place.strategy) is SingleDevice
    assert type(place.accelerator) is CPUAccelerator
    assert (place.device, place.devices) == (torch.device("cpu"), (0,))
    assert type(place.precision) is MixedPrecision


def test_s118_without_a_precision_the_modules_own_is_used():
    assert resolve_device_plan(**NOTHING, default_precision="64-true").precision.name == "64-true"
    assert resolve_device_plan(**{**NOTHING, "precision": 32}, default_precision="64-true").precision.name == "32"


def test_s118_a_strategy_brings_its_accelerator_and_precision(tmp_path):
    accelerator, precision = MyAccelerator(), MyPrecision()
    strategy = MyStrategy(accelerator=accelerator, precision_plugin=precision)
    place = placed(accelerator="auto", strategy=strategy, devices=[3])
    assert (place.strategy, place.accelerator, place.precision) == (strategy, accelerator, precision)
    assert place.devices == (3,)
    names = MyStrategy(accelerator="cpu", precision_plugin="64-true")
    assert placed(accelerator="auto", strategy=names).precision.name == "64-true"


def test_s118_plugins_are_strategies_and_precisions():
    strategy, precision = MyStrategy(), MyPrecision()
    place = placed(plugins=[strategy, precision])
    assert (place.strategy, place.precision) == (strategy, precision)
    assert placed(plugins=precision).precision is precision
    assert placed(strategy=strategy, plugins=[strategy]).strategy is strategy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision": "16-mixed", "plugins": [MyPrecision()]}, "precision is given twice: 16-mixed and MyPrecision"),
        ({"plugins": [MyPrecision(), MyPrecision()]}, "precision is given twice"),
        ({"precision": 32, "strategy": MyStrategy(precision_plugin=MyPrecision())}, "precision is given twice"),
        ({"strategy": "single", "plugins": [MyStrategy()]}, "strategy is given twice: single and mine"),
        ({"plugins": [MyStrategy(), SingleDevice()]}, "strategy is given twice: mine and single"),
        ({"accelerator": "cpu", "strategy": MyStrategy(accelerator=MyAccelerator())}, "accelerator is given twice"),
        ({"plugins": [MyAccelerator()]}, "accelerator=MyAccelerator()"),
        ({"plugins": [MyPrecision]}, "plugins=[MyPrecision()]"),
        ({"plugins": "ddp"}, "a Strategy or a Precision is needed"),
        ({"plugins": [3]}, "a Strategy or a Precision is needed"),
        ({"accelerator": "tpu"}, "there is no TPU support"),
        ({"accelerator": "cpu", "devices": 4, "strategy": "single"}, "uses one device at the most"),
        ({"devices": "two"}, "is needed"),
        ({"precision": "fp8"}, "no precision named 'fp8'"),
    ],
)
def test_s118_what_contradicts_or_means_nothing_is_told_before_any_device_is_asked(given, words):
    with pytest.raises(UsageError) as caught:
        check_device_plan(**{**NOTHING, **given})
    assert words in str(caught.value)
    assert caught.value.fix


def test_s118_a_strategy_says_how_many_devices_it_takes():
    place = placed(accelerator=MyAccelerator(), strategy=Wide(), devices=-1)
    assert place.devices == (0, 1, 2, 3)
    assert check_device_plan(**{**NOTHING, "strategy": Wide(), "devices": [0, 2]}).name == "wide"
    with pytest.raises(UsageError, match="uses one device"):
        placed(accelerator=MyAccelerator(), strategy=MyStrategy(), devices=-1)


def test_s118_each_process_has_a_device_of_its_own():
    class Numbered(MyAccelerator):
        def device(self, index):
            return torch.device("meta", index)

    assert placed(accelerator=Numbered(), strategy=Wide(), devices=[3, 1, 0]).device == torch.device("meta", 0)


def test_s118_a_trainer_runs_with_all_of_ones_own(tmp_path):
    strategy = MyStrategy(accelerator=MyAccelerator(), precision_plugin=MyPrecision())
    options = {"output_dir": tmp_path / "run", "max_epochs": 1, "enable_progress_bar": False}
    trainer = Trainer(strategy=strategy, **options)
    trainer.fit(net(), *loaders())
    assert trainer.fit_run.precision is strategy.precision_plugin
    assert trainer.is_global_zero
    assert trainer.callback_metrics["val_loss"] > 0
