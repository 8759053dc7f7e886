"""Phases: strategies as data, in recipes and in Python; what trains, until when, at which rates, and after a kill."""

from __future__ import annotations

import csv
import math
import signal
from pathlib import Path

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import SignalAt, state_digest

from flashtask import Callback, Finetuning, ImageClassifier, Module, Phase, Plateau, Trainer, read_checkpoint
from flashtask.core.errors import UsageError
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.lora import adapt
from flashtask.trainer.finetuning.strategies import FINETUNING, resolve_finetuning

PLATEAU = {"monitor": "val_loss", "patience": 1}


def trainer(folder: Path, **options) -> Trainer:
    options = {"max_epochs": 6, "seed": 3, "enable_model_summary": False, **options}
    return Trainer(output_dir=folder, enable_progress_bar=False, **options)


class Grouped(Net):
    """Takes the groups of the strategy."""

    scheduler = staticmethod(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5))

    def configure_optimizers(self):
        groups = self.trainer.fit_run.freezing.optimizer_groups(head=1e-2, backbone=1e-3)
        optimizer = torch.optim.AdamW(groups)
        scheduler = self.scheduler(optimizer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}


def grouped(seed: int = 1, scheduler=None) -> Grouped:
    torch.manual_seed(seed)
    made = Grouped()
    if scheduler is not None:
        made.scheduler = scheduler
    return made


class Epochs(Callback):
    """What changed in each epoch, and the rates at its first step."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer, module):
        self.before = {name: value.clone() for name, value in module.state_dict().items()}
        self.rates.append(
            {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups if "name" in group}
        )

    def on_train_epoch_end(self, trainer, module):
        now = module.state_dict()
        self.changed.append({name for name in now if not torch.equal(now[name], self.before[name])})


def watched(tmp_path, strategy, module=None, **options) -> tuple[Epochs, Trainer]:
    watch = Epochs()
    run = trainer(tmp_path, callbacks=watch, **options)
    run.finetune(module or net(), *loaders(), strategy=strategy)
    return watch, run


HEAD = {"head.weight", "head.bias"}
STATISTICS = {"backbone.2.running_mean", "backbone.2.running_var", "backbone.2.num_batches_tracked"}
ALL = HEAD | STATISTICS | {f"backbone.{layer}.{kind}" for layer in (0, 2, 3) for kind in ("weight", "bias")}
BIASES = {"backbone.0.bias", "backbone.2.bias", "backbone.3.bias"}
NORMS = STATISTICS | {"backbone.2.weight", "backbone.2.bias"}
LAST = {"backbone.3.weight", "backbone.3.bias"}


# ---- what trains


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("strategy", "changed"),
    [
        ("bitfit", [HEAD | BIASES] * 2),
        ("norm_only", [HEAD | NORMS] * 2),
        ("gradual:1", [HEAD, HEAD | LAST]),
        ("gradual:1:3", [HEAD, ALL]),
        ([Phase("all", epochs=1), Phase("head")], [ALL, HEAD]),
        ([Phase("biases", epochs=1), Phase("norms")], [HEAD | BIASES, HEAD | NORMS]),
        ([Phase({"layers": 1}, epochs=1), Phase(["biases", {"layers": 1}])], [HEAD | LAST, HEAD | BIASES | LAST]),
        ([Phase(["backbone.3.*"], epochs=1), Phase(["head", "*.0.w*"])], [LAST, HEAD | {"backbone.0.weight"}]),
    ],
)
def test_exactly_what_a_phase_names_changes(tmp_path, strategy, changed):
    """And the statistics of a BatchNorm only where all of it trains."""
    watch, run = watched(tmp_path, strategy, max_epochs=2)
    assert watch.changed == changed
    rows = [row["trainable_parameters"] for row in run.fit_run.history]
    sizes = {name: p.numel() for name, p in run.fit_run.module.named_parameters()}
    assert rows == [sum(sizes.get(name, 0) for name in names) for names in changed]


def test_a_head_that_no_pattern_names_is_frozen_like_a_backbone(tmp_path):
    modes = []

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            modes.append((self.head.training, self.head.weight.requires_grad, self.backbone[3].training))
            return super().training_step(batch, batch_idx)

    module = Watching()
    trainer(tmp_path, max_epochs=2).finetune(
        module, *loaders(), strategy=[Phase(["backbone.3.*"], epochs=1), Phase("head")]
    )
    assert set(modes) == {(False, False, True), (True, True, False)}
    assert all(p.requires_grad for p in module.parameters())


def test_biases_train_in_a_backbone_that_is_in_eval_mode():
    module = net()
    freezing = Freezing(module, resolve_finetuning("bitfit"))
    freezing.apply(0)
    assert not any(part.training for part in module.backbone.modules())
    assert module.drop.training
    Freezing(module, resolve_finetuning("norm_only")).apply(0)
    assert module.backbone[2].training
    assert not module.backbone[0].training


def test_gradual_has_a_phase_for_each_layer_of_a_real_backbone():
    module = ImageClassifier("timm/test_vit", num_classes=2, pretrained=False)
    freezing = Freezing(module, resolve_finetuning("gradual:2"))
    layers = len(module.layer_groups())
    assert freezing.finetuning.starts == [2 * number for number in range(layers + 1)]
    counts = [freezing.count(number) for number in range(layers + 1)]
    assert counts == sorted(set(counts))
    assert counts[-1] == sum(p.numel() for p in module.parameters())


def test_norms_of_a_library_are_found_by_what_they_are_called():
    module = ImageClassifier("timm/test_efficientnet", num_classes=2, pretrained=False)
    names = Freezing(module, resolve_finetuning("norm_only")).trainable(Phase("norms"))
    assert names == {name for name, _ in module.named_parameters() if name.startswith("backbone.") and ".bn" in name}


# ---- until when


def test_a_phase_ends_when_its_metric_no_longer_gets_better(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.2])

    class Scripted(Net):
        def on_validation_epoch_start(self):
            self.value = next(losses)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.value)

    phases = [Phase("head", plateau=Plateau("val_loss", patience=1)), Phase("all")]
    watch, run = watched(tmp_path, phases, Scripted(), num_sanity_val_steps=0)
    assert [bool(names - HEAD) for names in watch.changed] == [False, False, False, True, True, True]
    assert read_checkpoint(tmp_path / "last.ckpt")["progress"]["phases"]["ends"] == [[0, 3]]
    assert run.fit_run.phases.first_steps == [0, 21]


@pytest.mark.parametrize(
    ("plateau", "values", "ends_after"),
    [
        (Plateau("loss", patience=2), [1, 1, 1, 1], 2),
        (Plateau("loss", patience=2, min_delta=0.5), [2, 1.8, 1.6, 1.4], 2),
        (Plateau("m", patience=1, mode="max"), [1, 2, 1.5], 2),
        (Plateau("own", patience=1), [1, 2, 1.5], 2),
        (Plateau("loss", patience=1), [1, math.nan], 1),
        (Plateau("loss", patience=1), [3, 2, 1], None),
        (Plateau("val_f1", patience=1), [1, 2, 3], None),
    ],
)
def test_what_counts_as_a_plateau(plateau, values, ends_after):
    from flashtask.trainer.finetuning.phase_ends import PhaseProgress

    class Own(Module):
        monitor, monitor_mode = "own", "max"

    progress = PhaseProgress(Finetuning([Phase("head", plateau=plateau), Phase("all")]), Own())
    found = None
    for epoch, value in enumerate(values):
        progress.enter(epoch, epoch)
        progress.leave(epoch, epoch + 1, {plateau.monitor: value}, {plateau.monitor}, True)
        if progress.ends and found is None:
            found = epoch
    assert found == ends_after


def test_a_phase_of_steps_ends_with_the_epoch_in_which_they_are_full(tmp_path):
    """7 steps an epoch: 8 steps are full in epoch 1, 7 in the first epoch."""
    watch, _ = watched(tmp_path, [Phase("head", steps=8), Phase("biases", steps=7), Phase("all")], max_epochs=4)
    assert watch.changed == [HEAD, HEAD, HEAD | BIASES, ALL]


def test_of_several_ends_the_first_counts(tmp_path):
    strategy = [Phase("head", epochs=1, steps=1000), Phase("biases", epoch=2), Phase("all")]
    watch, _ = watched(tmp_path, strategy, max_epochs=3)
    assert watch.changed == [HEAD, HEAD | BIASES, ALL]


def test_the_end_of_the_last_phase_is_the_end_of_the_run(tmp_path):
    _, run = watched(tmp_path / "fixed", [Phase("head", epochs=1), Phase("all", epochs=2)])
    assert len(run.fit_run.history) == 3
    _, run = watched(tmp_path / "open", [Phase("head", epochs=1), Phase("all", steps=10)])
    assert len(run.fit_run.history) == 3
    assert run.fit_run.stop_reason == "the last phase of the strategy is over"


def test_a_metric_that_is_not_measured_is_an_error_with_near_matches(tmp_path):
    with pytest.raises(UsageError, match=r"phase 0 .*'val_los'(.|\n)*did you mean 'val_loss'"):
        watched(tmp_path, [Phase("head", plateau={"monitor": "val_los", "mode": "min"}), Phase("all")])


def test_where_a_run_stands_is_a_pure_function():
    strategy = Finetuning([Phase("head", epochs=2), Phase("biases", plateau="val_loss", epochs=4), Phase("all")])
    assert [strategy.position(epoch).number for epoch in range(8)] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [strategy.position(epoch, {1: 3}).number for epoch in range(5)] == [0, 0, 1, 2, 2]
    assert strategy.starts == [0, 2, None]


def test_a_phase_whose_epoch_is_over_before_it_begins_is_left_out():
    strategy = Finetuning([Phase("head", epochs=4), Phase("biases", epoch=2), Phase("all")])
    assert strategy.starts == [0, 4, 4]
    assert [strategy.position(epoch) for epoch in (3, 4, 5)] == [(0, 0), (2, 4), (2, 4)]
    assert Finetuning([Phase("head", epochs=4), Phase("all", epoch=3)]).length == 4


# ---- learning rates


def test_layers_have_a_share_of_the_rate_of_the_next():
    module = ImageClassifier("timm/test_vit", num_classes=2, pretrained=False)
    freezing = Freezing(module, resolve_finetuning("layer_decay:0.5"))
    groups = freezing.optimizer_groups(head=1.0, backbone=0.1)
    rates = {group["name"]: group["lr"] for group in groups}
    layers = len(module.layer_groups())
    assert rates == {"head": 1.0} | {f"backbone_layer{n}": 0.1 * 0.5 ** (n - 1) for n in range(1, layers + 1)}
    names = {id(p): name for name, p in module.named_parameters()}
    held = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert held["backbone_layer1"] == set(module.layer_groups()[-1])
    assert held[f"backbone_layer{layers}"] == set(module.layer_groups()[0])


@pytest.mark.long
def test_a_phase_changes_base_rates_and_the_cosine_goes_on_multiplying_them(tmp_path):
    """What every step uses is the phase's base rate times the schedule, which knows nothing of phases."""
    from test_tasks import small_data as image_data

    seen = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append((trainer.global_step, {g["name"]: g["lr"] for g in optimizer.param_groups}))

    module = ImageClassifier("timm/test_efficientnet", pretrained=False, learning_rate=0.1, backbone_learning_rate=0.01)
    phases = [
        Phase("head", epochs=1),
        Phase({"layers": 1}, epochs=1, learning_rates={"backbone": 0.04}),
        Phase("all", learning_rates={"head": 0.05}, factors={"backbone": 0.5}, layer_decay=0.9),
    ]
    run = trainer(tmp_path, max_epochs=3, callbacks=Rates())
    run.finetune(module, datamodule=image_data(tmp_path), strategy=phases)
    per_epoch = len(seen) // 3
    last = f"backbone_stage2_layer{len(module.layer_groups())}"
    base = {
        "head": [0.1, 0.1, 0.05],
        "backbone_stage1_layer1": [0.04, 0.04, 0.005],
        last: [0.005 * 0.9 ** (len(module.layer_groups()) - 1)] * 3,
    }
    starts = {"head": 0, "backbone_stage1_layer1": per_epoch, last: 2 * per_epoch}
    warm_up = max(1, round(0.05 * len(seen)))
    for step, rates in seen:
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(seen)))
        for name, by_phase in base.items():
            if step < starts[name]:
                continue
            rise = min(1, (step - starts[name] + 1) / warm_up)
            assert rates[name] == pytest.approx(by_phase[step // per_epoch] * cosine * rise), (step, name)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[1e-2, 1e-3], total_steps=6),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
        lambda o: None,
    ],
)
def test_any_schedule_multiplies_the_rates_of_phases(tmp_path, schedule):
    plain, _ = watched(tmp_path / "plain", [Phase("head", epochs=2), Phase("all")], grouped(scheduler=schedule))
    changed = [Phase("head", epochs=2), Phase("all", factors={"head": 0.1, "backbone": 4.0})]
    watch, _ = watched(tmp_path / "phases", changed, grouped(scheduler=schedule))
    for epoch, (before, now) in enumerate(zip(plain.rates, watch.rates, strict=True)):
        assert now["head"] == pytest.approx(before["head"] * (0.1 if epoch >= 2 else 1)), epoch
        # OneCycleLR was told a highest rate of its own, which the base of the first phase does not change.
        expected = before["backbone"] * watch.rates[0]["backbone"] / plain.rates[0]["backbone"]
        assert now["backbone"] == pytest.approx(expected), epoch


def test_lp_ft_goes_on_at_a_tenth_of_the_rates_where_freeze_unfreeze_keeps_them(tmp_path):
    constant = {"scheduler": lambda optimizer: None}
    watch, _ = watched(tmp_path / "lp_ft", "lp_ft:1", grouped(**constant), max_epochs=2)
    assert [rates["head"] for rates in watch.rates] == [1e-2, pytest.approx(1e-3)]
    assert watch.rates[1]["backbone"] == pytest.approx(1e-4)
    assert watch.changed == [HEAD, ALL]
    watch, _ = watched(tmp_path / "plain", "freeze_unfreeze:1", grouped(**constant), max_epochs=2)
    assert [rates["head"] for rates in watch.rates] == [1e-2, 1e-2]


def test_factors_have_the_rate_of_the_backbone_unless_a_phase_says_otherwise():
    for rates, expected in (({}, 0.1), ({"lora": 0.5}, 0.5), ({"backbone": 0.5}, 0.1)):
        module = net()
        strategy = Finetuning([Phase({"lora": 1}, learning_rates=rates)])
        adapt(module, [module.backbone], strategy.lora, seed=0)
        groups = Freezing(module, strategy).optimizer_groups(head=1.0, backbone=0.1)
        assert {group["name"]: group["lr"] for group in groups} == {"head": 1.0, "lora": expected}


def test_rates_for_an_optimizer_of_the_users_own_are_refused_with_the_line_to_write(tmp_path):
    with pytest.raises(UsageError, match=r"never edited(.|\n)*optimizer_groups"):
        watched(tmp_path, "layer_decay:0.5", net())


@pytest.mark.long
def test_many_groups_have_few_columns(tmp_path):
    from test_tasks import small_data as image_data

    from flashtask import LearningRateMonitor

    module = ImageClassifier("timm/test_vit", pretrained=False)
    run = trainer(tmp_path, max_epochs=1, callbacks=LearningRateMonitor(logging_interval="epoch"))
    run.finetune(module, datamodule=image_data(tmp_path / "images"), strategy="layer_decay:0.8")
    with (tmp_path / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    last = len(module.layer_groups())
    assert len({group["name"] for group in run.optimizers[0].param_groups}) == last + 1
    own = [name for name in columns if name.startswith("learning_rate")]
    assert own == ["learning_rate", "learning_rate_backbone_layer1", f"learning_rate_backbone_layer{last}"]
    assert sum(name.startswith("lr-AdamW/") for name in columns) == 3


# ---- after a kill

KILLED = [
    Phase("head", epochs=1),
    Phase({"layers": 1}, plateau=PLATEAU, epochs=3, learning_rates={"backbone": 2e-3}),
    Phase("biases", steps=8),
    Phase("all", factors={"head": 0.5, "backbone": 0.1}, layer_decay=0.5),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = trainer(folder, max_epochs=9)
    run.finetune(grouped(), *loaders(), strategy=KILLED)
    assert len(run.fit_run.phases.first_steps) == 4
    return state_digest(folder / "last.ckpt"), run.fit_run.phases.first_steps


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("phase", range(4))
@pytest.mark.parametrize("later", [1, 7])
def test_a_run_killed_in_the_middle_of_any_phase_or_at_its_border_ends_with_the_same_bits(
    tmp_path, undisturbed, phase, later
):
    bits, first_steps = undisturbed
    stop = SignalAt("train_batch_end", first_steps[phase] + later, signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer(tmp_path, max_epochs=9, callbacks=stop).finetune(grouped(), *loaders(), strategy=KILLED)
    again = trainer(tmp_path, max_epochs=9)
    again.finetune(grouped(seed=9), *loaders(), strategy=KILLED, ckpt_path="last")
    assert state_digest(tmp_path / "last.ckpt") == bits
    assert again.fit_run.phases.first_steps == first_steps


# ---- as data

RECIPE = {
    "phases": [
        {"train": "head", "epochs": 2},
        {"train": {"layers": 3}, "learning_rates": {"backbone": "1e-4"}, "until": {"plateau": PLATEAU}},
        {"train": ["norms", "backbone.0.*"], "until": {"epoch": 9, "steps": 100}, "factors": {"head": 0.5}},
        {"train": {"lora": {"rank": 4, "targets": ["qkv"]}}, "steps": 10},
        {"train": "all", "learning_rates": {"head": 1e-3, "backbone": 1e-5}, "layer_decay": 0.75},
    ]
}


def test_a_strategy_survives_the_way_into_a_recipe_and_back():
    strategy = resolve_finetuning(RECIPE)
    assert strategy.phases[1] == Phase({"layers": 3}, plateau=Plateau("val_loss", 1), learning_rates={"backbone": 1e-4})
    written = strategy.recipe()
    assert resolve_finetuning(written).phases == strategy.phases
    assert resolve_finetuning(written).recipe() == written
    assert resolve_finetuning(Finetuning(strategy.phases)).phases == strategy.phases
    assert written["phases"][3] == {"train": {"lora": {"rank": 4, "targets": ["qkv"]}}, "until": {"steps": 10}}


ARGUMENTS = {
    "freeze_unfreeze": ":3",
    "unfreeze_milestones": ":1,2:3",
    "lp_ft": ":2",
    "linear_probe_then_finetune": ":2",
}


@pytest.mark.parametrize("name", FINETUNING.names())
def test_every_named_strategy_is_written_by_its_name(name):
    strategy = resolve_finetuning(name + ARGUMENTS.get(name, ""))
    again = resolve_finetuning(strategy.recipe())
    assert isinstance(strategy.recipe(), str)
    assert (again.name, again.phases) == (strategy.name, strategy.phases)
    assert FINETUNING.entry(name).metadata["description"]


def test_stages_and_phases_say_the_same():
    by_phases = resolve_finetuning([Phase("head", epochs=3), Phase("all")])
    assert by_phases.stages == resolve_finetuning("freeze_unfreeze:3").stages
    assert by_phases.starts == resolve_finetuning("freeze_unfreeze:3").starts
    assert resolve_finetuning("bitfit").stages == ()


def phases(*items):
    return {"phases": list(items)}


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"phasen": []}, "strategy: there is no key 'phasen'(.|\n)*did you mean 'phases'"),
        ({"phases": {}}, r"strategy.phases: a list is needed"),
        (phases("head"), r"strategy.phases\[0\]: a phase has keys"),
        (phases({"epochs": 2}), r"strategy.phases\[0\]: `train` is missing"),
        (phases({"train": "heads"}), r"phases\[0\]\.train: 'heads' cannot be trained(.|\n)*did you mean 'head'"),
        (phases({"train": "all", "layer_decey": 1}), r"phases\[0\]: there is no key(.|\n)*'layer_decay'"),
        (phases({"train": {"layer": 1}}), r"phases\[0\]\.train: there is no 'layer'(.|\n)*'layers'"),
        (phases({"train": {"layers": -1}}), r"phases\[0\]\.train\.layers: a number of layers"),
        (phases({"train": ["head", "nroms"]}), r"phases\[0\]\.train\[1\]: 'nroms'(.|\n)*'norms'"),
        (phases({"train": {"lora": {"rang": 1}}}), r"phases\[0\]\.train\.lora: there is no key 'rang'(.|\n)*'rank'"),
        (phases({"train": {"lora": {"rank": 0}}}), r"phases\[0\]\.train\.lora\.rank: a whole number"),
        (phases({"train": "head"}, {"train": "all"}), "phase 0 has no end, so phase 1 would never begin"),
        (phases({"train": "head", "epochs": 0}), r"phases\[0\]\.epochs: a whole number"),
        (phases({"train": "head", "until": {"epohc": 1}}), r"phases\[0\]\.until: there is no key 'epohc'"),
        (phases({"train": "head", "until": {"epoch": -1}}), r"phases\[0\]\.until\.epoch: a whole"),
        (
            phases({"train": "head", "until": {"plateau": {"patiance": 1}}}),
            r"until\.plateau: there is no(.|\n)*'patience'",
        ),
        (phases({"train": "head", "until": {"plateau": {"patience": 0}}}), r"until\.plateau\.patience: a whole"),
        (phases({"train": "head", "epochs": 1, "until": {"epochs": 2}}), "the phase has it already"),
        (
            phases({"train": "all", "learning_rates": {"haed": 1}}),
            r"learning_rates: there is no key 'haed'(.|\n)*'head'",
        ),
        (phases({"train": "all", "learning_rates": {"head": 0}}), r"learning_rates\.head: a number above 0"),
        (
            phases({"train": "all", "learning_rates": {"head": 1}, "factors": {"head": 1}}),
            "learning_rates.head already",
        ),
        (phases({"train": "all", "layer_decay": 1.5}), "at most 1"),
        (phases({"train": "a", "epoch": 3}, {"train": "all"}), "'a' cannot be trained"),
        (phases({"train": "head", "epoch": 3}, {"train": "all", "epoch": 2}), "must grow"),
        ("lp_ft", "needs the epochs of the head alone"),
        ("gradual:0", "1 or more"),
        ("layer_decay:2", "at most 1"),
        ("lora:0", "lora.rank"),
        ("bitfit:3", "does not take"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_the_place(strategy, message):
    with pytest.raises(UsageError, match=message):
        resolve_finetuning(strategy)


def test_what_a_module_does_not_have_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"no parameter is called 'backbone.0.wieght'(.|\n)*backbone.0.weight"):
        watched(tmp_path / "a", [Phase(["backbone.0.wieght"])])
    module = net()
    module.backbone = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU())
    for strategy, missing in (("bitfit", "no biases"), ("norm_only", "no norms")):
        with pytest.raises(UsageError, match=missing):
            watched(tmp_path / strategy, strategy, module)


def test_the_announcement_says_what_is_never_reached(tmp_path, capsys):
    run = trainer(tmp_path, max_epochs=2, enable_model_summary=True)
    run.finetune(net(), *loaders(), strategy="freeze_unfreeze:5")
    said = capsys.readouterr().err
    assert "from epoch 5: 155 of 155 parameters train (all); the run ends before" in said


# ---- beside the rest of the engine


def test_phases_with_averaging_accumulation_and_a_tuned_rate(tmp_path):
    from flashtask import EMAWeightAveraging

    options = {"callbacks": EMAWeightAveraging(), "accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    run = trainer(tmp_path, max_epochs=3, **options)
    run.finetune(grouped(), *loaders(), strategy="lp_ft:1")
    assert [row["trainable_parameters"] for row in run.fit_run.history] == [27, 155, 155]
    assert run.global_step == 12


def test_rates_of_phases_and_annealing_weights_go_together(tmp_path):
    """From where weights are averaged on, the rates are the callback's; a phase that begins then only unfreezes."""
    from flashtask import StochasticWeightAveraging

    callbacks = [StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=1)]
    run = trainer(tmp_path, max_epochs=5, callbacks=callbacks)
    run.finetune(grouped(), *loaders(), strategy=[Phase("head", epochs=3), Phase("all", factors={"head": 0.1})])
    assert [row["trainable_parameters"] for row in run.fit_run.history] == [27, 27, 27, 155, 155]
    assert run.fit_run.history[-1]["learning_rate"] == pytest.approx(0.02)


def test_phases_given_to_the_trainer_are_shown_their_place():
    for strategy in ([Phase("head")], {"phases": [{"train": "head"}]}, Finetuning([Phase("head")])):
        with pytest.raises(UsageError, match="is for finetuning"):
            Trainer(strategy=strategy)


def test_several_optimizers_and_manual_ones_take_phases(tmp_path):
    class Two(Net):
        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]

        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

    class Manual(Net):
        automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    for kind in (Two, Manual):
        torch.manual_seed(1)
        watch, _ = watched(tmp_path / kind.__name__, [Phase("biases", steps=3), Phase("all")], kind(), max_epochs=2)
        assert watch.changed == [HEAD | BIASES, ALL]


def test_tuning_works_on_the_first_phase_and_leaves_the_module_alone():
    class Following(Grouped):
        def configure_optimizers(self):
            rate = self.hparams.learning_rate
            return torch.optim.AdamW(self.trainer.fit_run.freezing.optimizer_groups(head=rate, backbone=rate))

    torch.manual_seed(1)
    module = Following()
    before = digest(module)
    run = Trainer(max_epochs=2, enable_progress_bar=False)
    for strategy in ("lp_ft:1", "lora:1", "gradual:1"):
        found = run.tune(module, *loaders(samples=400), strategy=strategy, learning_rate={"num_training": 40})
        assert found.learning_rate.suggestion > 0
        assert digest(module) == before
