"""Finetuning strategies: what is frozen when, proved bit by bit, and what the optimizer holds."""

from __future__ import annotations

import csv
import re

import pytest
import torch
from small import Net, loaders, net

from flashtask import FINETUNING, STRATEGIES, Callback, Finetuning, Stage, Trainer
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.distribution.process_strategies import SingleDevice
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.strategies import resolve_finetuning


def quiet(tmp_path, **options):
    return Trainer(output_dir=tmp_path, enable_progress_bar=False, **options)


def bits(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


class Bits(Callback):
    """The backbone's weights and buffers at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, bytes]] = []

    def on_train_epoch_start(self, trainer, module):
        self.before = bits(module.backbone)

    def on_train_epoch_end(self, trainer, module):
        now = bits(module.backbone)
        self.epochs.append({name for name in now if now[name] != self.before[name]})


WEIGHTS = {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}
STATISTICS = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("strategy", "changed"),
    [
        ("freeze", [set(), set(), set()]),
        ("no_freeze", [WEIGHTS | STATISTICS] * 3),
        (("freeze_unfreeze", 1), [set(), WEIGHTS | STATISTICS, WEIGHTS | STATISTICS]),
        ("freeze_unfreeze:2", [set(), set(), WEIGHTS | STATISTICS]),
        (("unfreeze_milestones", ((1, 2), 1)), [set(), {"3.weight", "3.bias"}, WEIGHTS | STATISTICS]),
        ("unfreeze_milestones:1,2:1", [set(), {"3.weight", "3.bias"}, WEIGHTS | STATISTICS]),
        (Finetuning([Stage(0, 1), Stage(2, 2)]), [{"3.weight", "3.bias"}] * 2 + [None]),
    ],
)
def test_exactly_the_unfrozen_weights_and_statistics_change(tmp_path, strategy, changed):
    """Frozen parameters and buffers, BatchNorm's statistics among them, are bit-identical."""
    watch = Bits()
    quiet(tmp_path, max_epochs=3, callbacks=watch).finetune(net(), *loaders(), strategy=strategy)
    for epoch, expected in enumerate(changed):
        if expected is not None:
            assert watch.epochs[epoch] == expected, f"epoch {epoch}"


def test_s6_fit_with_a_strategy_is_finetune(tmp_path):
    watch = Bits()
    trainer = quiet(tmp_path, max_epochs=1, callbacks=watch)
    trainer.fit(net(), *loaders(), strategy="freeze")
    assert watch.epochs == [set()]
    assert trainer.fit_run.freezing.finetuning.name == "freeze"


def test_s124_the_frozen_part_runs_in_eval_mode_without_a_graph(tmp_path):
    seen = []

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            features = self.backbone(batch[0])
            seen.append((self.backbone.training, self.backbone[2].training, features.grad_fn, self.drop.training))
            return super().training_step(batch, batch_idx)

    quiet(tmp_path, max_epochs=1).finetune(Watching(), *loaders(), strategy="freeze")
    assert set(seen) == {(False, False, None, True)}


def test_s122_the_optimizer_holds_the_head_alone_when_the_backbone_never_trains(tmp_path):
    class Grouped(Net):
        def configure_optimizers(self):
            groups = self.trainer.fit_run.freezing.parameter_groups()
            return torch.optim.SGD([{"params": g.parameters, "name": g.name} for g in groups], lr=0.1)

    held = {}
    for strategy in ("freeze", "freeze_unfreeze:1", "unfreeze_milestones:1,2:1"):
        trainer = quiet(tmp_path / strategy, max_epochs=3)
        trainer.finetune(Grouped(), *loaders(), strategy=strategy)
        held[strategy] = [(g["name"], len(g["params"])) for g in trainer.fit_run.optimizers[0].param_groups]
    assert held == {
        "freeze": [("head", 2)],
        "freeze_unfreeze:1": [("head", 2), ("backbone", 6)],
        "unfreeze_milestones:1,2:1": [("head", 2), ("backbone_stage1", 2), ("backbone_stage2", 4)],
    }


def test_a_users_own_optimizer_is_never_edited(tmp_path):
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.finetune(net(), *loaders(), strategy="freeze")
    (group,) = trainer.fit_run.optimizers[0].param_groups
    assert len(group["params"]) == 8


def test_what_wants_gradients_is_as_before_after_the_run(tmp_path):
    module = net()
    module.backbone[0].bias.requires_grad_(False)
    before = bits(module.backbone)["0.bias"]
    quiet(tmp_path, max_epochs=2).finetune(module, *loaders(), strategy="freeze_unfreeze:1")
    wanted = {name: p.requires_grad for name, p in module.named_parameters()}
    assert wanted.pop("backbone.0.bias") is False
    assert all(wanted.values())
    assert bits(module.backbone)["0.bias"] == before


def test_unfreezing_and_parameter_counts_are_printed_and_logged(tmp_path, capsys):
    quiet(tmp_path, max_epochs=2).finetune(net(), *loaders(), strategy="freeze_unfreeze:1")
    said = capsys.readouterr().err
    assert "from epoch 0: 27 of 155 parameters train (head only)" in said
    assert "from epoch 1: 155 of 155 parameters train (all)" in said
    assert "epoch 1: unfreezing, 155 parameters train now" in said
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["trainable_parameters"] for row in csv.DictReader(file)] == ["27", "155"]


def test_a_strategy_of_ones_own_needs_only_stages(tmp_path):
    class Mine:
        name = "mine"

        def stages(self):
            return [Stage(0, 0), Stage(1, 1)]

    watch = Bits()
    quiet(tmp_path, max_epochs=2, callbacks=watch).finetune(net(), *loaders(), strategy=Mine())
    assert watch.epochs == [set(), {"3.weight", "3.bias"}]


def test_a_registered_strategy_is_found_by_name():
    @FINETUNING.register("last_layers")
    def last_layers(count=1):
        return Finetuning([Stage(0, count)], f"last_layers:{count}")

    try:
        assert resolve_finetuning("last_layers:2").stages == (Stage(0, 2),)
    finally:
        FINETUNING.remove("last_layers")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("frezze", "did you mean 'freeze'"),
        ("freeze_unfreeze", "needs the epoch"),
        (("freeze_unfreeze", 0), "1 or more"),
        (("freeze_unfreeze", "5"), "needs the epoch"),
        ("unfreeze_milestones:5", "two epochs"),
        ("unfreeze_milestones:10,5:5", "must grow"),
        (("freeze", 3), "does not take"),
        ("deepspeed_stage_2", r"no DeepSpeed support\n  fix: Trainer\(strategy='fsdp'\)"),
        ("ddp_spwn", r"'ddp_spawn' would be a strategy of distribution\n  fix: Trainer\(strategy='ddp_spawn'\)"),
        (("ddp",), r"fix: Trainer\(strategy='ddp'\)"),
        (SingleDevice(), r"Trainer\(strategy=SingleDevice\(...\)\)"),
        (SingleDevice, r"Trainer\(strategy=SingleDevice\(\)\)"),
        (7, "a name, a tuple or an object"),
        (Finetuning, "a name, a tuple or an object"),
    ],
)
def test_an_invalid_strategy_is_an_error(tmp_path, strategy, message):
    with pytest.raises(UsageError, match=message):
        quiet(tmp_path).finetune(net(), *loaders(), strategy=strategy)


@pytest.mark.parametrize("name", ["auto", *STRATEGIES.names()])
def test_every_strategy_of_distribution_is_sent_to_the_trainer_and_works_there(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        quiet(tmp_path).finetune(net(), *loaders(), strategy=name)
    assert f"fix: Trainer(strategy={name!r})" in str(caught.value)
    Trainer(strategy=name, logger=False)


@pytest.mark.parametrize("name", FINETUNING.names())
def test_every_finetuning_strategy_is_sent_from_the_trainer_to_finetune(name):
    with pytest.raises(UsageError, match=re.escape(f"trainer.finetune(model, ..., strategy={name!r})")):
        Trainer(strategy=name)


def test_a_module_without_a_backbone_says_what_to_write(tmp_path):
    class Bare(Net):
        def __init__(self):
            super().__init__()
            self.body = self.backbone
            del self.backbone

    with pytest.raises(UsageError, match="modules_to_freeze"):
        quiet(tmp_path, max_epochs=1).finetune(Bare(), *loaders(), strategy="freeze")


def test_an_unknown_name_is_a_lookup_error_too():
    with pytest.raises(UnknownNameError):
        resolve_finetuning("unfreze_milestone:1,2:3")


def test_stages_are_a_pure_function_of_the_epoch():
    strategy = resolve_finetuning("unfreeze_milestones:2,5:3")
    assert [strategy.stage(epoch).layers for epoch in range(7)] == [0, 0, 3, 3, 3, None, None]


def test_layers_are_counted_from_the_output():
    module = net()
    freezing = Freezing(module, resolve_finetuning("unfreeze_milestones:1,2:2"))
    assert freezing.trainable(Stage(1, 2)) == {
        "backbone.2.weight",
        "backbone.2.bias",
        "backbone.3.weight",
        "backbone.3.bias",
    }
