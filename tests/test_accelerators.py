"""Accelerators and devices: what names, numbers and the `gpus` of 1.x mean, and what is told where there is none."""

from __future__ import annotations

import pytest
import torch
from small import loaders, net

from flashtask import Module, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.devices.accelerators import (
    ACCELERATORS,
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    accelerator_of,
    check_accelerator,
    resolve_accelerator,
    resolve_device,
)
from flashtask.trainer.devices.selection import check_devices, device_indices
from flashtask.trainer.lightning1.older_arguments import devices_of_gpus, unoccupied

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
no_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device here")


class Several(CPUAccelerator):
    """Four devices that all compute on the CPU."""

    name = "several"

    def device_count(self):
        return 4


class Elsewhere(Accelerator):
    """A device that is never here."""

    name = "elsewhere"

    def is_available(self):
        return False


# ---- accelerators


def test_s116_the_accelerators_are_listed_and_found_by_name():
    assert ACCELERATORS.names() == ["cpu", "cuda", "mps"]
    kinds = {name: type(check_accelerator(name)) for name in ("cpu", "CPU", "cuda", "gpu", "mps")}
    assert kinds == {
        "cpu": CPUAccelerator,
        "CPU": CPUAccelerator,
        "cuda": CUDAAccelerator,
        "gpu": CUDAAccelerator,
        "mps": MPSAccelerator,
    }
    assert ACCELERATORS.get("gpu") is ACCELERATORS.get("cuda") is CUDAAccelerator


def test_s116_an_accelerator_gives_its_devices():
    assert CPUAccelerator().device(0) == torch.device("cpu")
    assert CUDAAccelerator().device(2) == torch.device("cuda", 2)
    assert MPSAccelerator().device(0) == torch.device("mps")
    assert CPUAccelerator().is_available()
    assert CPUAccelerator().device_count() == 1
    assert CUDAAccelerator().device_count() == torch.cuda.device_count()


@no_cuda
@no_mps
def test_s116_auto_is_the_cpu_where_there_is_nothing_else():
    assert type(resolve_accelerator("auto")) is CPUAccelerator


@no_cuda
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_s116_an_accelerator_that_is_not_here_is_told(name):
    with pytest.raises(UsageError, match=f"accelerator='{name}': there is no CUDA device here") as caught:
        resolve_accelerator(name)
    assert caught.value.fix == 'accelerator="cpu"'


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpu", "there is no TPU support"),
        ("ipu", "there is no IPU support"),
        ("hpu", "there is no HPU support"),
        ("HPU", "there is no HPU support"),
        ("gpuu", "did you mean 'gpu'"),
        ("mpps", "did you mean 'mps'"),
        ("abacus", "choose one of: auto, cpu, cuda, mps, gpu"),
        (3, "no accelerator named '3'"),
        (CPUAccelerator, "accelerator=CPUAccelerator()"),
    ],
)
def test_s116_what_is_no_accelerator_is_told_with_what_to_use(name, words):
    with pytest.raises(UsageError) as caught:
        check_accelerator(name)
    assert words in str(caught.value)
    assert caught.value.fix


def test_s116_an_accelerator_of_ones_own_is_used_as_it_is_or_by_its_registered_name():
    own = Several()
    assert resolve_accelerator(own) is own
    ACCELERATORS.register("several", Several)
    try:
        assert isinstance(resolve_accelerator("several"), Several)
        assert resolve_device("several", [3]) == torch.device("cpu")
    finally:
        ACCELERATORS.remove("several")
    with pytest.raises(UsageError, match="no accelerator named 'several'"):
        check_accelerator("several")


def test_s116_an_accelerator_of_ones_own_that_is_not_here_is_told():
    with pytest.raises(UsageError, match=r"accelerator=Elsewhere\(\): there is no elsewhere device here"):
        resolve_accelerator(Elsewhere())


def test_s116_an_accelerator_of_ones_own_has_to_name_its_device():
    with pytest.raises(UsageError, match="Elsewhere has no device"):
        Elsewhere().device(0)


def test_only_what_computes_bfloat16_itself_says_so():
    capabilities = torch.cpu.get_capabilities()
    expected = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    assert CPUAccelerator().computes_bfloat16(torch.device("cpu")) is expected
    assert not MPSAccelerator().computes_bfloat16(torch.device("mps"))
    assert not accelerator_of(torch.device("meta")).computes_bfloat16(torch.device("meta"))
    assert type(accelerator_of(torch.device("cuda", 1))) is CUDAAccelerator


# ---- devices


@pytest.mark.parametrize(
    ("devices", "meant"),
    [
        ("auto", None),
        (1, 1),
        ("1", 1),
        (3, 3),
        ("3", 3),
        (-1, -1),
        ("-1", -1),
        ("all", -1),
        ([0], (0,)),
        ((1,), (1,)),
        ("2,", (2,)),
        ([0, 2], (0, 2)),
        ("0,2", (0, 2)),
        (" 0, 2 ", (0, 2)),
    ],
)
def test_s99_every_way_to_say_which_devices_is_read(devices, meant):
    assert check_devices(devices, None) == meant


@pytest.mark.parametrize(
    "devices", [0, "0", -2, "-2", True, None, 1.0, "", ",", "two", "0-2", [], [-1], [True], ["0"], [0, 0], {0}]
)
def test_s99_what_means_no_devices_is_told(devices):
    with pytest.raises(UsageError, match="is needed") as caught:
        check_devices(devices, None)
    assert "devices=1" in caught.value.fix


@pytest.mark.parametrize("devices", [2, "2", [0, 1], "0,1", (3, 5)])
def test_s99_more_than_one_device_needs_a_strategy_of_distribution(devices):
    with pytest.raises(UsageError, match="this strategy uses one device at the most") as caught:
        check_devices(devices)
    assert 'strategy="ddp"' in caught.value.fix
    assert check_devices(devices, 2)


def test_s99_devices_become_their_numbers():
    several = Several()
    assert device_indices("auto", several) == [0]
    assert device_indices([3], several) == [3]
    assert device_indices(3, several, None) == [0, 1, 2]
    assert device_indices(-1, several, None) == [0, 1, 2, 3]
    assert device_indices(-1, CPUAccelerator()) == [0]
    with pytest.raises(UsageError, match="uses one device"):
        device_indices(-1, several)


@pytest.mark.parametrize("devices", [5, [4], "0,4"])
def test_s99_a_device_that_is_not_here_is_told(devices):
    with pytest.raises(UsageError, match="several devices here are numbered 0 to 3"):
        device_indices(devices, Several(), None)


def test_s99_processes_share_the_cores_of_a_cpu():
    assert device_indices(4, CPUAccelerator(), None) == [0, 1, 2, 3]
    with pytest.raises(UsageError) as caught:
        device_indices([4], CPUAccelerator())
    assert "torch.set_num_threads" in caught.value.fix


# ---- gpus of 1.x


@pytest.mark.parametrize("gpus", [None, 0, "0", [], ()])
def test_s99_no_gpus_is_the_cpu(gpus):
    assert devices_of_gpus(gpus) == ("cpu", 1, "")


@no_cuda
@pytest.mark.parametrize("gpus", [-1, "-1", "all"])
def test_s99_all_gpus_where_there_is_none_is_the_cpu_and_is_said(gpus):
    accelerator, devices, message = devices_of_gpus(gpus)
    assert (accelerator, devices) == ("cpu", 1)
    assert "there is no CUDA device here, so the CPU is used" in message


@no_cuda
@pytest.mark.parametrize("gpus", [1, "1", 2, [0], [1, 3], "0,1"])
@pytest.mark.parametrize("auto_select", [False, True])
def test_s99_gpus_that_are_not_here_are_an_error_with_the_fix(gpus, auto_select):
    with pytest.raises(UsageError, match="the CUDA devices here are: none") as caught:
        devices_of_gpus(gpus, auto_select)
    assert "gpus=0" in caught.value.fix


@pytest.mark.parametrize("gpus", [True, False, "auto", "two", 1.5, -2, [-1]])
def test_s99_what_means_no_gpus_is_told(gpus):
    with pytest.raises(UsageError, match="-1 for all or 0 for none is needed"):
        devices_of_gpus(gpus)


def gigabytes(*free, total=16):
    return [(left * 2**30, total * 2**30) for left in free]


def test_s100_the_devices_with_the_most_free_memory_are_taken():
    assert unoccupied(gigabytes(9, 16, 2, 15, 15), 1) == [1]
    assert unoccupied(gigabytes(9, 16, 2, 15, 15), 3) == [1, 3, 4]
    assert unoccupied(gigabytes(16, 16, 16, 16), 2) == [0, 1]


def test_s100_a_device_in_use_is_not_taken():
    with pytest.raises(UsageError, match="only 1 of 3 CUDA devices are unoccupied") as caught:
        unoccupied(gigabytes(3, 7, 12), 2)
    assert "gpus=1" in caught.value.fix
    with pytest.raises(UsageError, match="only 0 of 1"):
        unoccupied([(0, 1)], 1)


# ---- no `.to(device)`


class Agnostic(Module):
    """Makes tensors on the way without naming a device, and keeps one as a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.register_buffer("sigma", torch.eye(3))
        self.devices = []

    def forward(self, inputs):
        return self.layer(inputs + torch.zeros(4).type_as(inputs)) @ self.sigma

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self(inputs), targets)

    def predict_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self(inputs)
        self.devices += [one.device for one in (inputs, targets, outputs, self.sigma, self.layer.weight)]
        return outputs

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Meta(Accelerator):
    """Torch's device without storage, which every machine has: what is there cannot be mixed with what is not."""

    name = "meta"

    def device(self, index):
        return torch.device("meta")


def quiet(tmp_path, **options):
    return Trainer(output_dir=tmp_path / "run", enable_progress_bar=False, enable_model_summary=False, **options)


def test_s95_weights_buffers_and_batches_go_to_the_device_by_themselves(tmp_path):
    module = Agnostic()
    outputs = quiet(tmp_path, accelerator=Meta()).predict(module, loaders()[1])
    assert len(outputs) == 7
    assert {one.device for one in outputs} == set(module.devices) == {torch.device("meta")}


def test_s95_the_same_module_trains_on_the_cpu(tmp_path):
    torch.manual_seed(0)
    module = Agnostic()
    before = module.layer.weight.clone()
    quiet(tmp_path, accelerator="cpu", max_epochs=1).fit(module, loaders()[0])
    assert module.layer.weight.device == torch.device("cpu")
    assert not torch.equal(module.layer.weight, before)


def test_s116_a_trainer_runs_on_an_accelerator_of_ones_own(tmp_path):
    asked = []

    class Watched(CPUAccelerator):
        def device(self, index):
            asked.append(index)
            return super().device(index)

    trainer = quiet(tmp_path, accelerator=Watched(), max_epochs=1)
    trainer.fit(net(), *loaders())
    assert asked
    assert trainer.fit_run.device == torch.device("cpu")
