"""What a run means in several processes: who is given what, who decides, and what is refused (rows S96 to S119)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from flashtask import Callback, CombinedLoader, Module, Trainer
from flashtask.core.batchnorm import synchronize_batchnorm
from flashtask.core.errors import ProcessLostError, UsageError
from flashtask.trainer.device_plan import resolve_device_plan
from flashtask.trainer.distribution.data_parallel import ForkedDataParallel
from flashtask.trainer.distribution.environment import process_info
from flashtask.trainer.distribution.process_strategies import Strategy

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
#: Sums are taken in another order.
TOLERANCE = 1e-6


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def samples(count):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator))


class Small(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)))

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer_of(tmp_path, processes, **options):
    several = {"devices": processes, "strategy": "ddp_spawn"} if processes > 1 else {}
    return Trainer(**{"max_epochs": 2, "output_dir": tmp_path / f"run-{processes}", **QUIET, **several, **options})


def weights_of(module):
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def fitted(tmp_path, processes, make, count=11, **options):
    """A fit with 4 samples a step, whatever the number of processes."""
    module, trainer = make(), trainer_of(tmp_path, processes, **options)
    trainer.fit(module, DataLoader(samples(count), batch_size=4 // processes, shuffle=True))
    return module, trainer


def assert_as_with_one(tmp_path, make, **options):
    one, _ = fitted(tmp_path, 1, make, **options)
    two, _ = fitted(tmp_path, 2, make, **options)
    assert not torch.equal(weights_of(one), weights_of(make()))
    assert (weights_of(one) - weights_of(two)).abs().max() <= TOLERANCE


# ---- who is there


def placed(**given):
    settings = {"accelerator": "cpu", "devices": "auto", "strategy": None, "precision": None, "plugins": None}
    return resolve_device_plan(**{**settings, **given}, default_precision="32")


def started(monkeypatch, rank=1, size=4, local=2, launcher="torchrun"):
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    if launcher == "torchrun":
        variables["TORCHELASTIC_RUN_ID"] = "none"
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("devices", "name"),
    [(1, "single"), ("auto", "single"), ([0], "single"), ("1", "single"), (2, "ddp"), ([0, 1], "ddp"), ("2", "ddp")],
)
def test_s102_several_devices_mean_ddp(devices, name, monkeypatch):
    monkeypatch.setattr("flashtask.trainer.distribution.launching.is_script", lambda: True)
    assert Trainer(devices=devices).strategy.name == name


def test_s103_several_devices_without_a_script_mean_ddp_spawn(monkeypatch):
    monkeypatch.delattr("__main__.__file__", raising=False)
    monkeypatch.setattr("__main__.__spec__", None)
    assert Trainer(devices=2).strategy.name == "ddp_spawn"


def test_s117_who_was_started_by_torchrun_joins_the_others_by_himself(monkeypatch):
    started(monkeypatch)
    strategy = Trainer().strategy
    assert (strategy.name, strategy.global_rank, strategy.world_size, strategy.local_rank) == ("ddp", 1, 4, 1)
    assert placed().devices == (0, 1)
    assert Trainer(strategy="single").strategy.world_size == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"devices": 3}, "torchrun has started 2 processes on this machine"),
        ({"devices": 2, "num_nodes": 3}, "torchrun has started 4 processes"),
    ],
)
def test_s105_what_contradicts_the_launcher_is_told(monkeypatch, given, said):
    started(monkeypatch)
    with pytest.raises(UsageError, match=said) as caught:
        placed(**given)
    assert "devices" in caught.value.fix


def test_s105_num_nodes_that_agree_with_the_launcher_are_taken(monkeypatch):
    started(monkeypatch)
    assert placed(devices=2, num_nodes=2).strategy.world_size == 4


def test_s105_several_machines_need_somebody_who_starts_the_processes(tmp_path):
    trainer = trainer_of(tmp_path, 1, devices=2, num_nodes=2, strategy="ddp")
    with pytest.raises(UsageError, match="a process has to be started on each machine") as caught:
        trainer.fit(Small(), DataLoader(samples(4)))
    assert "torchrun --nnodes 2" in caught.value.fix


def test_s99_s101_each_process_has_the_gpu_of_its_number(monkeypatch):
    from flashtask.trainer.devices.accelerators import CPUAccelerator

    class Four(CPUAccelerator):
        name = "four"

        def device_count(self):
            return 4

        def device(self, index):
            return torch.device("meta", index)

    started(monkeypatch)
    assert placed(accelerator=Four()).device == torch.device("meta", 1)
    assert placed(accelerator=Four(), devices=[3, 2]).device == torch.device("meta", 2)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert placed(accelerator=Four(), strategy="ddp").devices == (0, 1, 2, 3)
    assert placed(accelerator=Four()).devices == (0,)


@pytest.mark.parametrize("strategy", ["single", "ddp_spawn"])
def test_s105_strategies_of_one_machine_say_so(tmp_path, strategy):
    with pytest.raises(UsageError, match="one machine") as caught:
        trainer_of(tmp_path, 1, num_nodes=2, strategy=strategy).fit(Small(), DataLoader(samples(4)))
    assert 'strategy="ddp"' in caught.value.fix


@pytest.mark.parametrize(
    ("node", "local", "further", "rank"), [(0, 1, {}, 1), (0, 2, {}, 2), (1, 1, {"LOCAL_WORLD_SIZE": "2"}, 3)]
)
def test_s105_node_rank_and_local_rank_say_which_process_this_is(node, local, further, rank):
    said = {"WORLD_SIZE": "4", "NODE_RANK": str(node), "LOCAL_RANK": str(local), "MASTER_ADDR": "a", **further}
    assert process_info(said).rank == rank
    if further:
        del said["LOCAL_WORLD_SIZE"]
        with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE is not"):
            process_info(said)


@pytest.mark.parametrize(("node", "said"), [("2", "there are num_nodes=2 machines"), ("one", "is no whole number")])
def test_s105_a_machine_that_cannot_be_is_refused(tmp_path, monkeypatch, node, said):
    for name, value in (("NODE_RANK", node), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        trainer_of(tmp_path, 1, num_nodes=2, strategy="ddp").fit(Small(), DataLoader(samples(4)))


SCRIPT = """
import os
import sys
import torch
from torch.utils.data import DataLoader
from test_several_processes import QUIET, Small, samples
from flashtask import Trainer

class MayFail(Small):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and os.environ.get("FAILS") == os.environ["RANK"]:
            raise ValueError("too much for me")
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    trainer = Trainer(**QUIET, devices=2, num_nodes=2, max_epochs=2, enable_checkpointing=False)
    module = MayFail()
    trainer.fit(module, DataLoader(samples(11), batch_size=1, shuffle=True))
    strategy = trainer.strategy
    torch.save(module.state_dict(), f"weights-{strategy.global_rank}.pt")
    sys.stdout.write(f"{strategy.global_rank} {strategy.local_rank} {strategy.world_size}\\n")  # as one piece
"""


def on_two_machines(tmp_path, **environment):
    """Exit code, output and errors of the script on two machines, which here are the same machine twice."""
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **environment}
    settings["MASTER_PORT"] = str(free_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**settings, "NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    told = [node.communicate(timeout=120) for node in nodes]
    return [(node.returncode, *texts) for node, texts in zip(nodes, told, strict=True)]


@pytest.mark.long
def test_s105_s117_a_process_on_each_machine_starts_the_others_there(tmp_path):
    found = on_two_machines(tmp_path)
    assert [code for code, _, _ in found] == [0, 0], found
    assert [sorted(out.splitlines()) for _, out, _ in found] == [["0 0 4", "1 1 4"], ["2 0 4", "3 1 4"]]
    one, _ = fitted(tmp_path, 1, Small)
    for rank in range(4):
        for name, value in torch.load(tmp_path / f"weights-{rank}.pt").items():
            assert (one.state_dict()[name] - value).abs().max() <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_c5_an_error_on_one_of_two_machines_is_told_on_both(tmp_path, rank):
    found = on_two_machines(tmp_path, FAILS=str(rank))
    assert [code for code, _, _ in found] == [1, 1], found
    for node, (_, _, errors) in enumerate(found):
        assert "too much for me" in errors
        is_its_own = rank == 2 * node  # then the traceback ends with it
        assert is_its_own or f"process {rank} of 4 failed: ValueError: too much for me" in errors, errors
        assert errors.count("Traceback (most recent call last)") <= 2, errors


class LogsSteps(Small):
    """Logs on steps and in validation, where process 1 may have nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, sync_dist=True)
        self.log("most", batch[0].max(), on_step=True, on_epoch=False, sync_dist=True, reduce_fx="max", batch_size=2)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", batch[0].sum() / len(batch[0]), on_step=True, sync_dist=True, reduce_fx="mean")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.trainer.fit_run.results.step_values())


@pytest.mark.long
def test_tensors_of_all_processes_are_gathered(tmp_path):
    class Gathering(Small):
        def training_step(self, batch, batch_idx):
            found = self.all_gather({"rank": torch.tensor(float(self.global_rank)), "size": [len(batch[0])]})
            self.log("ranks", found["rank"].sum())
            self.log("shape", float(found["size"][0].numel()))
            with pytest.raises(UsageError, match="without gradients"):
                self.all_gather(batch[0], sync_grads=True)
            return super().training_step(batch, batch_idx)

    trainer = trainer_of(tmp_path, 2, max_epochs=1)
    trainer.fit(Gathering(), DataLoader(samples(8), batch_size=2))
    assert (trainer.callback_metrics["ranks"], trainer.callback_metrics["shape"]) == (1.0, 2.0)


@pytest.mark.long
@pytest.mark.parametrize("count", [5, 9, 11])
def test_s98_values_of_steps_count_each_sample_once(tmp_path, count):
    """With 5 and 9 samples nothing is left for process 1 in the last step, and nothing in validation."""
    seen, validated = [], []
    for processes in (1, 2):
        module, trainer = LogsSteps(), trainer_of(tmp_path, processes, max_epochs=1)
        loaders = DataLoader(samples(count), batch_size=4 // processes), DataLoader(samples(1))
        trainer.fit(module, *loaders)
        seen.append(module.seen)
        validated.append([trainer.callback_metrics[f"val_{level}"] for level in ("step", "epoch")])
    assert len(seen[0]) == -(-count // 4)
    for one, two in zip(*seen, strict=True):
        assert one == pytest.approx(two, abs=TOLERANCE)
    assert validated[0] == pytest.approx(validated[1], abs=TOLERANCE)


# ---- who is given what


@pytest.mark.long
def test_s97_a_loader_with_a_sampler_of_its_own_is_refused(tmp_path):
    data = samples(8)
    trainer = trainer_of(tmp_path, 2)
    with pytest.raises(UsageError, match="would take all samples") as caught:
        trainer.fit(Small(), DataLoader(data, sampler=RandomSampler(data, num_samples=4)))
    assert "use_distributed_sampler=False" in caught.value.fix


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True])
def test_s96_a_loader_that_shares_its_samples_itself_is_left_alone(tmp_path, own):
    data = samples(8)

    class Counting(Small):
        def training_step(self, batch, batch_idx):
            self.log("samples", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
            rank = self.trainer.strategy.global_rank
            sampler = DistributedSampler(data, 2, rank, shuffle=False) if own else range(8)
            whole = torch.cat([data[i][0][None] for i in sampler])
            assert torch.equal(batch[0], whole[batch_idx * 2 : batch_idx * 2 + 2])
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            rank = self.trainer.strategy.global_rank
            sampler = DistributedSampler(data, 2, rank, shuffle=False) if own else None
            return DataLoader(data, batch_size=2, sampler=sampler)

    trainer = trainer_of(tmp_path, 2, max_epochs=1, use_distributed_sampler=own)
    trainer.fit(Counting())
    assert trainer.callback_metrics["samples"] == (8 if own else 16)
    assert trainer.global_step == (2 if own else 4)


@pytest.mark.long
def test_s96_with_samples_of_ones_own_losses_count_alike(tmp_path):
    """Each process takes all samples in their order, so two of them are as one."""
    found = []
    for processes in (1, 2):
        module = Small()
        trainer = trainer_of(tmp_path, processes, use_distributed_sampler=False)
        trainer.fit(module, DataLoader(samples(10), batch_size=4))
        found.append(weights_of(module))
    assert (found[0] - found[1]).abs().max() <= TOLERANCE


# ---- the same weights


class Counting(ForkedDataParallel):
    """Counts the exchanges of small values."""

    asked = 0

    def reduce(self, value, how="mean"):
        self.asked += 1
        return super().reduce(value, how)


class OneExchangeAStep(Callback):
    """Fails where a step asks the other processes more than once, gradients apart."""

    def on_train_epoch_start(self, trainer, module):
        self.before = trainer.strategy.asked

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        asked, self.before = trainer.strategy.asked - self.before, trainer.strategy.asked
        if asked != 1:
            raise ValueError(f"{asked} exchanges in a step")


@pytest.mark.long
def test_a_step_exchanges_one_small_vector_with_the_other_processes(tmp_path):
    module, trainer = Small(), trainer_of(tmp_path, 2, strategy=Counting(), callbacks=OneExchangeAStep())
    trainer.fit(module, DataLoader(samples(12), batch_size=2))
    assert trainer.global_step == 6


class CountingValidation(ForkedDataParallel):
    """Counts what a validation asks the other processes for."""

    asked = gathers = 0

    def reduce(self, value, how="mean"):
        self.asked += 1
        return super().reduce(value, how)

    def gather(self, value):
        self.gathers += 1
        return super().gather(value)


class Validating(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("val_other", 1.0)


class NotingExchanges(Validating):
    late = False

    def on_validation_epoch_end(self):
        strategy = self.trainer.strategy
        self.before = strategy.asked, strategy.gathers
        if self.late and self.global_rank == 0:
            self.log("late", 5.0, rank_zero_only=True)

    def on_validation_end(self):
        strategy = self.trainer.strategy
        self.exchanges = strategy.asked - self.before[0], strategy.gathers - self.before[1]


@pytest.mark.long
@pytest.mark.parametrize("late", [False, True])
def test_values_of_a_validation_are_exchanged_again_only_if_a_hook_has_logged(tmp_path, late):
    module = NotingExchanges()
    module.late = late
    trainer = trainer_of(tmp_path, 2, strategy=CountingValidation())
    (found,) = trainer.validate(module, DataLoader(samples(11), batch_size=2))
    (alone,) = trainer_of(tmp_path, 1).validate(Validating(), DataLoader(samples(11), batch_size=2))
    assert found == {**{name: pytest.approx(value) for name, value in alone.items()}, **({"late": 5.0} if late else {})}
    assert module.exchanges == ((2, 2) if late else (0, 1))


class Together(Small):
    def training_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + 2 * self.loss(batch["b"])


def fitted_on_two(tmp_path, processes, make, mode, counts):
    """A fit on two loaders with 4 samples of each in a step, whatever the number of processes."""
    a, b = (DataLoader(samples(count), batch_size=4 // processes, shuffle=True) for count in counts)
    module, trainer = make(), trainer_of(tmp_path, processes)
    trainer.fit(module, CombinedLoader({"a": a, "b": b}, mode))
    return module, trainer


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("make", "mode", "counts"),
    [
        (Small, "sequential", (11, 6)),
        (Small, "sequential", (5, 9)),
        (Together, "min_size", (8, 14)),
        (Together, "max_size_cycle", (8, 16)),
    ],
)
def test_s97_several_loaders_train_as_with_one_process(tmp_path, make, mode, counts):
    """Each loader is shared by its own length; a sample that only fills a step counts for nothing."""
    one, alone = fitted_on_two(tmp_path, 1, make, mode, counts)
    two, trainer = fitted_on_two(tmp_path, 2, make, mode, counts)
    assert trainer.global_step == alone.global_step
    assert not torch.equal(weights_of(one), weights_of(make()))
    assert (weights_of(one) - weights_of(two)).abs().max() <= TOLERANCE


class WithUnused(Small):
    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            return self.loss(batch)
        return nn.functional.cross_entropy(self.last(batch[0].repeat(1, 4)), batch[1])


@pytest.mark.long
def test_s114_parameters_without_a_part_in_a_loss_need_their_strategy(tmp_path):
    one, _ = fitted(tmp_path, 1, WithUnused)
    module, trainer = WithUnused(), trainer_of(tmp_path, 1, devices=2, strategy="ddp_find_unused_parameters")
    trainer.strategy.__class__ = type(
        "Forked", (type(trainer_of(tmp_path, 2).strategy),), {"name": "ddp_find_unused_parameters"}
    )
    trainer = trainer_of(tmp_path, 2, output_dir=tmp_path / "unused", strategy=trainer.strategy)
    trainer.fit(module, DataLoader(samples(11), batch_size=2, shuffle=True))
    assert (weights_of(module) - weights_of(one)).abs().max() <= TOLERANCE
    with pytest.raises((ProcessLostError, RuntimeError), match="find_unused_parameters"):
        fitted(tmp_path, 2, WithUnused)


class TwoOptimizers(Small):
    def training_step(self, batch, batch_idx, optimizer_idx):
        return self.loss(batch) * (optimizer_idx + 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.SGD(self.last.parameters(), lr=0.05)]


@pytest.mark.long
def test_s114_several_optimizers_train_as_with_one_process(tmp_path):
    assert_as_with_one(tmp_path, TwoOptimizers)


class Manual(Small):
    limit = None

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, self.limit)
        optimizer.step()


class ManualClipped(Manual):
    limit = 0.1


class Closure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


@pytest.mark.long
@pytest.mark.parametrize("make", [Manual, ManualClipped, Closure])
@pytest.mark.parametrize("count", [9, 12])
def test_s114_manual_optimization_trains_as_with_one_process(tmp_path, make, count):
    """9 samples: in the last step one of two processes has none."""
    # Where a line search stops hangs by the last bits of float32, with one process too.
    assert_as_with_one(tmp_path, make, count=count, precision="64-true")


@pytest.mark.long
def test_s114_every_process_begins_with_the_weights_of_the_first(tmp_path):
    class Different(Small):
        def configure_optimizers(self):
            assert float(self.last.bias.detach().sum()) == float(self.expected)
            return super().configure_optimizers()

        def setup(self, stage):
            self.expected = self.last.bias.detach().sum()
            with torch.no_grad():
                self.last.bias += self.trainer.strategy.global_rank

    module, _ = fitted(tmp_path, 2, Different)
    assert torch.isfinite(weights_of(module)).all()


@pytest.mark.long
def test_s114_validation_sees_the_same_statistics_in_every_process(tmp_path):
    class Normed(Small):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs):
            return super().forward(self.norm(inputs))

        def validation_step(self, batch, batch_idx):
            means = self.trainer.strategy.gather(self.norm.running_mean.clone())
            assert torch.equal(means[0], means[1])
            assert means[0].any()
            self.log("val_loss", self.loss(batch), sync_dist=True)

    trainer = trainer_of(tmp_path, 2, num_sanity_val_steps=0)
    loader = DataLoader(samples(12), batch_size=2, shuffle=True)
    trainer.fit(Normed(), loader, DataLoader(samples(8), batch_size=2))
    assert trainer.callback_metrics["val_loss"] > 0


# ---- who decides


@pytest.mark.long
def test_s98_a_value_that_is_not_shared_is_the_first_process_s_for_all(tmp_path):
    class Plateau(Small):
        def training_step(self, batch, batch_idx):
            self.log("own", float(self.trainer.strategy.global_rank * self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "own"}}

    class Rates(Callback):
        def on_epoch_end(self, trainer, module):
            rates = trainer.strategy.gather(trainer.optimizers[0].param_groups[0]["lr"])
            assert rates[0] == rates[1]

    _, trainer = fitted(tmp_path, 2, Plateau, max_epochs=3, callbacks=Rates())
    assert trainer.callback_metrics["own"] == 0
    assert trainer.fit_run.optimizers[0].param_groups[0]["lr"] < 0.1


@pytest.mark.long
def test_s98_what_only_the_first_process_logs_is_known_to_all(tmp_path):
    class First(Small):
        def training_step(self, batch, batch_idx):
            if self.trainer.is_global_zero:
                self.log("first", 7.0, on_step=False, on_epoch=True, rank_zero_only=True)
            return super().training_step(batch, batch_idx)

    class Known(Callback):
        def on_epoch_end(self, trainer, module):
            assert trainer.callback_metrics["first"] == 7.0

    _, trainer = fitted(tmp_path, 2, First, callbacks=Known())
    assert trainer.callback_metrics["first"] == 7.0


def test_s28_s33_what_is_tuned_is_found_in_one_process(tmp_path):
    with pytest.raises(UsageError, match="tune looks for numbers in one process") as caught:
        trainer_of(tmp_path, 2).tune(Small(), DataLoader(samples(8)), learning_rate=True)
    assert "devices=1" in caught.value.fix


# ---- sync_batchnorm, objects of one's own


@pytest.mark.long
def test_s114_sync_batchnorm_is_refused_where_torch_has_none(tmp_path):
    with pytest.raises(UsageError, match="SyncBatchNorm refuses tensors on cpu"):
        fitted(tmp_path, 2, Small, sync_batchnorm=True)
    _, trainer = fitted(tmp_path, 1, Small, sync_batchnorm=True)
    assert trainer.global_step == 6


def test_s114_sync_batchnorm_keeps_names_weights_and_activations():
    from timm.layers import BatchNormAct2d

    module = nn.Module()
    module.plain, module.timm = nn.Sequential(nn.BatchNorm2d(3)), BatchNormAct2d(3)
    before = list(module.state_dict())
    inputs = torch.randn(2, 3, 4, 4)
    expected = module.eval().timm(inputs)
    synchronize_batchnorm(module, torch.device("cuda"))
    assert list(module.state_dict()) == before
    assert isinstance(module.plain[0], nn.SyncBatchNorm)
    assert isinstance(module.timm, nn.SyncBatchNorm)
    assert torch.equal(module.eval().timm(inputs), expected)


def test_s114_sync_batchnorm_refuses_a_layer_that_it_would_change():
    class Scaled(nn.BatchNorm2d):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    class Named(nn.BatchNorm2d):
        """Computes what torch's does."""

    with pytest.raises(UsageError, match=r"in the place of .*Scaled"):
        synchronize_batchnorm(nn.Sequential(nn.Sequential(Scaled(3))), torch.device("cuda"))
    module = nn.Sequential(Named(3))
    synchronize_batchnorm(module, torch.device("cuda"))
    assert type(module[0]) is nn.SyncBatchNorm


def test_s118_a_strategy_of_ones_own_goes_through_plugins_too(tmp_path):
    class Mine(Strategy):
        name = "mine"

    own = Mine()
    assert Trainer(plugins=[own]).strategy is own
    assert Trainer(plugins=own, devices=1).strategy is own
    with pytest.raises(UsageError, match="uses one device at the most"):
        Trainer(plugins=own, devices=2)
