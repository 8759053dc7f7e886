"""`fsdp`: each process has its share of a model, and everything else is as with one process."""

import copy
import sys
from functools import partial

import pytest
import torch
from test_distribution import SOON, TOLERANCE, Small, assert_nobody_is_left, run_script, samples
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from flashtask import Callback, EMAWeightAveraging, GradientNormMonitor, Module, StochasticWeightAveraging, Trainer
from flashtask.core.checkpoint import read_checkpoint
from flashtask.core.errors import DivergedError, UsageError
from flashtask.trainer.distribution.process_strategies import STRATEGIES, resolve_strategy
from flashtask.trainer.distribution.sharded import ForkedFullyShardedDataParallel, FullyShardedDataParallel
from flashtask.trainer.distribution.sharded_module import blocks_of
from flashtask.trainer.loss_checks import NanGuard


class Block(nn.Module):
    """Odd sizes, so that the shares of the processes differ."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(7), nn.Linear(7, 7)

    def forward(self, inputs):
        Block.calls += 1
        return inputs + torch.tanh(self.layer(self.norm(inputs)))


class Net(Module):
    """A backbone of blocks with BatchNorm before them, and a head; its step calls the module itself."""

    def __init__(self, normalises=False):
        super().__init__()
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7)) if normalises else nn.Linear(4, 7)
        self.backbone = nn.Sequential(first, Block(), Block(), Block())
        self.head = nn.Linear(7, 3)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)
        self.log("val_count", float(len(batch[0])), reduce_fx="sum", sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def trainer_of(folder, processes, **options):
    several = {"devices": processes, "strategy": "fsdp_spawn"} if processes > 1 else {}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    # Adam's first steps have the size of its rate, so in half precision the order of samples may turn one around.
    return Trainer(accelerator="cpu", output_dir=folder, seed=0, **{"max_epochs": 2, **quiet, **several, **options})


def loaders(count, processes):
    """4 samples a step, whatever the number of processes."""
    size, data = 4 // processes, samples(count)
    return DataLoader(data, batch_size=size, shuffle=True), DataLoader(data, batch_size=size)


def fitted(folder, processes, count, module=None, ckpt_path=None, **options):
    module = module or Net()
    trainer = trainer_of(folder, processes, **options)
    trainer.fit(module, *loaders(count, processes), ckpt_path=ckpt_path)
    return module, trainer


def weights_of(module):
    return torch.cat([one.detach().flatten().float() for one in module.state_dict().values()])


def difference(one, two):
    return (weights_of(one) - weights_of(two)).abs().max()


# ---- the same numbers


@pytest.mark.parametrize("count", [5, *(pytest.param(count, marks=pytest.mark.long) for count in (1, 3, 8))])
def test_s114_fsdp_reaches_the_weights_and_metrics_of_one_process(tmp_path, count):
    one, first = fitted(tmp_path / "1", 1, count)
    two, second = fitted(tmp_path / "2", 2, count)
    assert difference(one, Net()) > 0.01
    assert difference(one, two) <= TOLERANCE
    assert second.callback_metrics["val_count"] == count
    assert second.callback_metrics == pytest.approx(first.callback_metrics, abs=TOLERANCE)


@pytest.mark.long
def test_processes_with_different_numbers_of_batches_evaluate_together(tmp_path):
    class Several(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    found = []
    for processes in (1, 2):
        module, trainer = Several(), trainer_of(tmp_path / str(processes), processes, max_epochs=1)
        sizes = [DataLoader(samples(count), batch_size=4 // processes) for count in range(1, 10)]
        trainer.fit(module, loaders(5, processes)[0], sizes)
        found.append(trainer.callback_metrics)
    assert [found[1][f"val_count/dataloader_idx_{n}"] for n in range(9)] == list(range(1, 10))
    assert found[0] == pytest.approx(found[1], abs=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize(
    "clipping",
    [
        {"gradient_clip_val": 0.3},
        pytest.param({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, marks=pytest.mark.long),
    ],
)
def test_accumulated_gradients_are_clipped_as_with_one_process(tmp_path, clipping):
    class Sgd(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    one, _ = fitted(tmp_path / "1", 1, 13, Sgd(), accumulate_grad_batches=3, **clipping)
    two, _ = fitted(tmp_path / "2", 2, 13, Sgd(), accumulate_grad_batches=3, **clipping)
    free, _ = fitted(tmp_path / "3", 1, 13, Sgd(), accumulate_grad_batches=3)
    assert difference(one, two) <= TOLERANCE
    assert difference(one, free) > 0.001


@pytest.mark.long
def test_unfreezing_turns_gradients_on_and_shares_nothing_out_anew(tmp_path):
    found = []
    for processes in (1, 2):
        module = Net(normalises=True)
        trainer = trainer_of(tmp_path / str(processes), processes, max_epochs=4)
        phases = {"phases": [{"train": "head", "epochs": 2}, {"train": {"layers": 2}, "epochs": 2}]}
        trainer.finetune(module, *loaders(13, processes), strategy=phases)
        found.append(module)
    assert difference(*found) <= TOLERANCE
    assert not torch.equal(found[1].backbone[3].layer.weight, Net(normalises=True).backbone[3].layer.weight)
    assert torch.equal(found[1].backbone[0][0].weight, Net(normalises=True).backbone[0][0].weight)


@pytest.mark.long
def test_blocks_that_are_computed_again_have_the_same_gradients(tmp_path):
    plain, _ = fitted(tmp_path / "1", 2, 8)
    Block.calls = 0
    strategy = ForkedFullyShardedDataParallel(activation_checkpointing=True, auto_wrap_policy={Block})
    again, _ = fitted(tmp_path / "2", 2, 8, strategy=strategy)
    assert difference(plain, again) <= TOLERANCE
    assert Block.calls == 3 * (2 * 4 + 2 + 2 * 2)  # blocks * (twice in each step, sanity check, validation)
    assert "forward" not in vars(again.backbone[1])


@pytest.mark.long
@pytest.mark.parametrize(
    "precision", ["bf16-mixed", *(pytest.param(name, marks=pytest.mark.long) for name in ("16-mixed", "bf16-true"))]
)
def test_number_formats_are_those_of_one_process(tmp_path, precision):
    one, _ = fitted(tmp_path / "1", 1, 8, precision=precision)
    two, _ = fitted(tmp_path / "2", 2, 8, precision=precision)
    assert {p.dtype for p in two.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert difference(one, Net()) > 0.05
    assert difference(one, two) <= {"bf16-mixed": 0.01, "16-mixed": 0.002, "bf16-true": 0.03}[precision]


@pytest.mark.long
def test_weights_can_be_exchanged_in_half_precision(tmp_path):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    strategy = ForkedFullyShardedDataParallel(mixed_precision=policy)
    one, _ = fitted(tmp_path / "1", 1, 8)
    two, trainer = fitted(tmp_path / "2", 2, 8, strategy=strategy)
    assert {p.dtype for p in two.parameters()} == {torch.float32}
    assert 1e-5 < difference(one, two) < 0.02
    assert trainer.callback_metrics["val_count"] == 8


class Shares(Callback):
    """What a process holds in the middle of training."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step != 2:
            return
        held = [p.to_local().numel() for p in module.parameters()]
        gradients = [p.grad.to_local().numel() for p in module.parameters()]
        states = [s["exp_avg"].to_local().numel() for s in optimizer.state.values()]
        of_all = trainer.strategy.gather((sum(held), sum(gradients), sum(states)))
        trainer.say(f"shares {of_all} of {sum(p.numel() for p in module.parameters())}")


@pytest.mark.long
def test_each_process_holds_its_share_of_weights_gradients_and_states(tmp_path, capsys):
    fitted(tmp_path, 2, 12, callbacks=[Shares()])
    # Rows are dealt out: 4 and 3 of 7, 2 and 1 of 3.
    assert "shares [(156, 156, 156), (113, 113, 113)] of 269" in capsys.readouterr().err


@pytest.mark.long
def test_norms_of_gradients_are_those_of_one_process(tmp_path):
    class Seen(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            values = trainer.fit_run.results.step_values()
            found.append([values["grad_2.0_norm_total"], values["grad_2.0_norm/head.bias"]])

    several = []
    for processes in (1, 2):
        found = []
        callbacks = [GradientNormMonitor(per_parameter=True), Seen()]
        fitted(tmp_path / str(processes), processes, 8, callbacks=callbacks, log_every_n_steps=1)
        several.append(found)
    assert len(several[0]) == 4
    assert torch.allclose(torch.tensor(several[0]), torch.tensor(several[1]), atol=TOLERANCE)


@pytest.mark.long
def test_all_processes_begin_with_the_weights_of_the_first(tmp_path):
    class Drawn(Net):
        def setup(self, stage):
            if self.trainer.strategy.global_rank:
                with torch.no_grad():
                    self.head.weight += 1

    one, _ = fitted(tmp_path / "1", 1, 8, Drawn())
    two, _ = fitted(tmp_path / "2", 2, 8, Drawn())
    assert difference(one, two) <= TOLERANCE


@pytest.mark.long
def test_a_loss_that_one_process_finds_to_be_nan_reaches_the_weights_of_none(tmp_path, capfd):
    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss * float("nan") if self.trainer.strategy.global_rank and self.global_step == 1 else loss

    class AsOnAnAccelerator(Callback):
        def on_fit_start(self, trainer, module):
            of_all = partial(trainer.strategy.reduce, how="max")
            trainer.fit_run.guard = NanGuard(torch.device("cpu"), waits=False, of_all=of_all)

        def on_exception(self, trainer, module, exception):
            finite = all(bool(p.to_local().isfinite().all()) for p in module.parameters())
            print(f"process {trainer.strategy.global_rank}: {type(exception).__name__}, finite: {finite}", flush=True)

    with pytest.raises(DivergedError):
        fitted(tmp_path, 2, 8, Diverges(), callbacks=[AsOnAnAccelerator()], num_sanity_val_steps=0)
    said = capfd.readouterr().out
    assert "process 0: DivergedError, finite: True" in said  # its own losses were finite
    assert "finite: False" not in said  # the other may be ended before it says anything


# ---- checkpoints


def plain(content):
    """Names, shapes and kinds of everything in a file's weights and optimizer states."""
    states = content["optimizer_states"][0]
    shapes = {name: (type(one), one.shape, one.dtype) for name, one in content["state_dict"].items()}
    held = {
        (number, name): (type(one), one.shape, one.dtype)
        for number, values in states["state"].items()
        for name, one in values.items()
    }
    return shapes, held, states["param_groups"][0]["params"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "then"), [(2, 1), *(pytest.param(*pair, marks=pytest.mark.long) for pair in ((1, 2), (2, 2)))]
)
def test_checkpoints_are_those_of_one_process_and_are_read_by_any_number(tmp_path, first, then):
    whole, _ = fitted(tmp_path / "whole", 1, 22)
    files = {}
    for processes in (1, 2):
        fitted(tmp_path / str(processes), processes, 22, max_steps=4)  # in the middle of the first epoch
        files[processes] = tmp_path / str(processes) / "last.ckpt"
    one, two = (read_checkpoint(files[processes]) for processes in (1, 2))
    assert plain(one) == plain(two)
    again, trainer = fitted(tmp_path / "then", then, 22, ckpt_path=files[first], max_steps=7)
    assert difference(again, whole) > 1e-3
    last = tmp_path / "then" / "last.ckpt"
    again, trainer = fitted(tmp_path / "first again", first, 22, ckpt_path=last)
    assert trainer.global_step == 12
    assert difference(again, whole) <= TOLERANCE
    assert torch.equal(weights_of(Net.load_from_checkpoint(last)), weights_of(read_as_module(last)))


def read_as_module(path):
    module = Net()
    module.load_state_dict(read_checkpoint(path)["state_dict"])
    return module


@pytest.mark.long
def test_after_a_fit_the_module_is_whole_and_every_stage_goes_on(tmp_path):
    one, first = fitted(tmp_path / "1", 1, 9)
    two, second = fitted(tmp_path / "2", 2, 9)
    data = samples(9)
    assert {type(p) for p in two.parameters()} == {nn.Parameter}
    assert [type(part) for part in two.modules()] == [type(part) for part in one.modules()]
    assert not any(vars(part).get("_forward_hooks") for part in two.modules())
    expected = copy.deepcopy(two)(data.tensors[0]).detach()
    assert torch.equal(two(data.tensors[0]), expected)
    outputs = torch.cat(second.predict(two, DataLoader(data, batch_size=2)))
    assert torch.allclose(outputs, expected, atol=TOLERANCE)
    tested = second.test(two, DataLoader(data, batch_size=2))
    assert tested[0] == pytest.approx(first.test(one, DataLoader(data, batch_size=2))[0], abs=TOLERANCE)
    second.save_checkpoint(tmp_path / "after.ckpt")
    assert plain(read_checkpoint(tmp_path / "after.ckpt")) == plain(read_checkpoint(tmp_path / "1" / "last.ckpt"))
    for trainer, module, processes in ((first, one, 1), (second, two, 2)):
        trainer.max_epochs = 4
        trainer.fit(module, *loaders(9, processes), ckpt_path=tmp_path / str(processes) / "last.ckpt")
        assert trainer.global_step == 12
    assert difference(one, two) <= TOLERANCE


@pytest.mark.long
def test_an_average_of_the_weights_is_that_of_one_process_also_after_a_resume(tmp_path):
    def average():
        return [EMAWeightAveraging(0.8)]

    one, _ = fitted(tmp_path / "1", 1, 9, callbacks=average())
    two, second = fitted(tmp_path / "2", 2, 9, callbacks=average())
    fitted(tmp_path / "3", 2, 9, callbacks=average(), max_steps=4)
    again, _ = fitted(tmp_path / "4", 2, 9, callbacks=average(), ckpt_path=tmp_path / "3" / "last.ckpt")
    plain_weights, _ = fitted(tmp_path / "5", 2, 9)
    assert difference(two, plain_weights) > 0.001
    assert max(difference(one, two), difference(again, two)) <= TOLERANCE
    second.save_checkpoint(tmp_path / "after.ckpt")
    assert difference(read_as_module(tmp_path / "after.ckpt"), two) == 0


@pytest.mark.long
def test_factors_of_lora_are_shared_out_too(tmp_path):
    found = []
    for processes in (1, 2):
        module = Net()
        trainer = trainer_of(tmp_path / str(processes), processes)
        trainer.finetune(module, *loaders(9, processes), strategy="lora:2", restore_best=False)
        found.append(module.merge_lora())
    assert difference(*found) <= TOLERANCE
    assert difference(found[1], Net()) > 0.01


@pytest.mark.long
def test_several_optimizers_take_their_turns(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.head, self.backbone)]

    one, _ = fitted(tmp_path / "1", 1, 9, Two())
    two, _ = fitted(tmp_path / "2", 2, 9, Two())
    assert difference(one, two) <= TOLERANCE


class Manual(Net):
    automatic_optimization = False


class WithNumber(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (Manual, {}, "automatic_optimization"),
        (WithNumber, {}, "scale is a single number"),
        (Net, {"callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]}, "StochasticWeightAveraging does not work"),
        (Net, {"strategy": {"cpu_offload": True}}, "the weights are on the CPU already"),
        (Net, {"strategy": {"auto_wrap_policy": {nn.Conv2d}}}, "no part of the class Conv2d"),
        (Net, {"strategy": {"auto_wrap_policy": set(), "activation_checkpointing": True}}, "has no blocks"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_reason(tmp_path, module, options, said):
    if "strategy" in options:
        options = {"strategy": ForkedFullyShardedDataParallel(**options["strategy"])}
    with pytest.raises(UsageError, match=said) as refused:
        fitted(tmp_path, 2, 8, module(), **options)
    assert "fix:" in str(refused.value)


@pytest.mark.long
def test_s102_s117_fsdp_starts_the_script_again_or_meets_those_of_torchrun(tmp_path):
    for name, command in (("alone", ()), ("torchrun", ("-m", "torch.distributed.run", "--nproc-per-node", "2"))):
        folder = tmp_path / name
        folder.mkdir()
        done, _ = run_script(folder, "trains", "fsdp", command=(sys.executable, *command))
        assert done.returncode == 0, done.stderr
        assert all(done.stdout.count(f"{rank}: epoch 4, step 20") == 1 for rank in (0, 1))
        assert torch.equal(torch.load(folder / "weights-0.pt"), torch.load(folder / "weights-1.pt"))
        assert_nobody_is_left(folder)


@pytest.mark.long
def test_c1_where_one_process_fails_the_others_stop(tmp_path):
    done, seconds = run_script(tmp_path, "fails", "fsdp")
    assert done.returncode != 0
    assert done.stderr.count("process 1 of 2 failed: ValueError: the third step is too much for me") == 1
    assert seconds < SOON
    assert_nobody_is_left(tmp_path)


def test_s119_fsdp_is_listed():
    assert {"fsdp", "fsdp_cpu_offload", "fsdp_spawn"} <= set(STRATEGIES.names())
    assert type(resolve_strategy("fsdp")) is FullyShardedDataParallel
    assert resolve_strategy("fsdp_cpu_offload").cpu_offload


# ---- blocks


def test_blocks_are_those_of_the_backbone_and_never_share_a_weight():
    module = Net()
    assert blocks_of(module) == list(module.backbone)
    assert blocks_of(module, {Block}) == list(module.backbone)[1:]
    assert blocks_of(module, set()) == []
    module.head.weight = module.backbone[3].layer.weight
    assert blocks_of(module, {Block}) == list(module.backbone)[1:3]


def test_a_module_without_a_backbone_has_blocks_too():
    module = Small()
    assert blocks_of(module) == [module.layers[0], module.layers[2]]
