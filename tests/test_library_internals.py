"""What is used of other libraries beyond their documented interfaces still works, and is used in one file alone."""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import multiprocessing
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchmetrics
from huggingface_hub import constants
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from flashtask.core import library_internals as internals

ROOT = Path(__file__).resolve().parents[1]
HOME = "core/library_internals.py"
LIBRARIES = ("torch", "torchvision", "timm", "torchmetrics", "huggingface_hub")


def batch_norm_class():
    layers = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2), timm.layers.BatchNormAct2d(2)]
    assert all(isinstance(layer, internals.batch_norm_class()) for layer in layers)
    assert not isinstance(nn.LayerNorm(2), internals.batch_norm_class())


def normalization_class():
    assert all(
        isinstance(layer, internals.normalization_class()) for layer in (nn.BatchNorm2d(2), nn.InstanceNorm2d(2))
    )
    assert not isinstance(nn.LayerNorm(2), internals.normalization_class())


def let_workers_go():
    loader = DataLoader(torch.arange(4), num_workers=1, persistent_workers=True)
    for _ in range(2):
        assert len(list(loader)) == 4
        assert multiprocessing.active_children()
        kept = loader._iterator  # as the traceback of an error keeps it
        internals.let_workers_go(loader)
        assert not multiprocessing.active_children()
        assert kept is not loader._iterator


def tensor_tables():
    layer = nn.BatchNorm1d(2)
    parameters, buffers = internals.tensor_tables(layer)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    parameters["weight"] = nn.Parameter(torch.full((2,), 7.0))
    assert layer.weight.tolist() == [7, 7]


def give_own_part_table():
    whole = nn.Sequential(nn.Linear(2, 2))
    other = copy.copy(whole)
    internals.give_own_part_table(other)["0"] = nn.Identity()
    assert isinstance(whole[0], nn.Linear)
    assert isinstance(other[0], nn.Identity)


def forward_hooks():
    layer, hooks = nn.Linear(2, 2), [lambda *given: None, lambda *given: None]
    assert internals.forward_hooks(layer) == ()
    layer.register_forward_hook(hooks[0])
    layer.register_forward_pre_hook(hooks[1])
    assert internals.forward_hooks(layer) == tuple(hooks)


def hook_tables():
    layer, tables = nn.Linear(2, 2), internals.hook_tables(nn.Linear(2, 2))
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"} <= set(tables)
    assert not any(tables.values())
    layer.register_forward_hook(lambda *given: torch.zeros(1))
    internals.hook_tables(layer)["_forward_hooks"].clear()
    assert layer(torch.ones(2)).shape == (2,)


def is_view():
    tensor = torch.ones(4)
    assert internals.is_view(tensor[:2])
    assert not internals.is_view(tensor)


def mark_as_stepped():
    """torch warns where a schedule steps before its optimizer."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    internals.mark_as_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


#: In a process of its own: one that had a group cannot be forked any more, as other tests do.
WITH_MESH = """
import gc, weakref
import torch.distributed as dist
from torch import nn
from torch.distributed._composable_state import _get_module_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from flashtask.core import library_internals as internals

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
"""


def with_mesh(code):
    subprocess.run([sys.executable, "-c", WITH_MESH + code], check=True, capture_output=True, text=True)


def forget_fsdp():
    with_mesh("""
layer = nn.Linear(2, 2)
fully_shard(layer, mesh=mesh)
assert _get_module_state(layer) is not None
internals.forget_fsdp(layer)
assert _get_module_state(layer) is None
dist.destroy_process_group()
""")


def forget_groups():
    with_mesh("""
group = weakref.ref(mesh.get_group())
internals.forget_groups(mesh)
dist.destroy_process_group()
gc.collect()
assert group() is None
assert mesh.size() == 1
""")


def change_count():
    tensor = torch.zeros(2)
    before = internals.change_count(tensor)
    tensor.add_(1)
    assert internals.change_count(tensor) > before


def rate_lists():
    schedules = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    inner = [schedules.ConstantLR(optimizer, 1.0), schedules.StepLR(optimizer, 1, gamma=0.5)]
    schedule = schedules.SequentialLR(optimizer, inner, milestones=[1])
    lists = list(internals.rate_lists(schedule))
    assert all(any(found is one.base_lrs for found in lists) for one in inner)
    for rates in lists:
        rates[0] *= 10
    optimizer.param_groups[0]["lr"] *= 10
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [5.0]
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [2.5]
    assert list(internals.rate_lists(object())) == []


def layer_versions():
    versions = internals.layer_versions(nn.BatchNorm1d(2).state_dict())
    assert versions[""]["version"] >= 2
    assert internals.layer_versions({}) is None


def set_layer_versions():
    """Only in a state of an old BatchNorm torch fills in the count of batches."""
    layer, state = nn.BatchNorm1d(2), nn.BatchNorm1d(2).state_dict()
    plain = OrderedDict((name, tensor) for name, tensor in state.items() if name != "num_batches_tracked")
    layer.load_state_dict(plain)
    internals.set_layer_versions(plain, internals.layer_versions(state))
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer.load_state_dict(plain)


def before_each_operation():
    seen = []

    def check(operation, args, options):
        torch.zeros(5)  # is not passed on again
        seen.append((str(operation), args, options))

    with internals.before_each_operation(check):
        found = torch.ones(2) + 1
    assert found.tolist() == [2, 2]
    assert [name for name, _, _ in seen] == ["aten.ones.default", "aten.add.Tensor"]
    assert seen[0][1] == ([2],)


def makes_no_memory():
    aten = torch.ops.aten
    assert all(internals.makes_no_memory(one) for one in (aten.add_.Tensor, aten.view.default))
    assert not any(internals.makes_no_memory(one) for one in (aten.add.Tensor, aten.ones.default))


def on_meta():
    (one, rest), number = internals.on_meta(([torch.ones(2), {"a": (torch.ones(3),)}], 4))
    assert (one.device.type, rest["a"][0].device.type, number) == ("meta", "meta", 4)


def fused_convolution():
    fused = internals.fused_convolution()
    if not torch.backends.mkldnn.is_available():
        assert fused is None
        return
    layer, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        found = fused(images, layer.weight, layer.bias, [1, 1], [1, 1], [1, 1], 1, "relu", [], "none")
        assert torch.allclose(found, layer(images).relu(), atol=1e-5)


def compiled_call():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = torch.nn.Linear(2, 2)
    internals.compiled_call(torch.compile(module, backend=backend), module)
    module(torch.ones(1, 2))
    assert len(graphs) == 1


def repeated_while():
    class Doubling(nn.Module):
        def forward(self, turns, value):
            step = lambda turn, value: (turn - 1, value * 2)  # noqa: E731
            return internals.repeated_while(lambda turn, value: turn > 0, step, (turns, value))[1]

    value = torch.tensor([1.0, 5.0])
    exported = torch.export.export(Doubling(), (torch.tensor(3), value)).module()
    for network in (Doubling(), exported):
        assert network(torch.tensor(4), value).tolist() == [16, 80]


def is_from_compiler():
    def stops(values):
        torch._dynamo.graph_break()
        return values

    with pytest.raises(Exception, match="graph") as caught:
        torch.compile(stops, backend="eager", fullgraph=True)(torch.ones(1))
    assert internals.is_from_compiler(caught.value)
    assert not internals.is_from_compiler(ValueError())


def extractor_graphs():
    net = create_feature_extractor(resnet18(), {"layer1": "0"}, suppress_diff_warning=True)
    for graph in internals.extractor_graphs(net):
        end = next(node for node in reversed(graph.nodes) if node.op == "output")
        assert list(end.args[0]) == ["0"]


def timm_arguments():
    model = timm.create_model("test_vit", num_classes=0, img_size=64)
    assert internals.timm_arguments(model)["img_size"] == 64
    assert internals.timm_arguments(nn.Linear(2, 2)) is None


def hub_weight_names():
    assert list(internals.hub_weight_names(None)) == ["model.safetensors", "pytorch_model.bin"]
    assert list(internals.hub_weight_names("my.bin")) == ["my.safetensors", "my.bin"]


def metric_state():
    metric = torchmetrics.MeanMetric()
    names = internals.metric_state(metric)
    fresh = {name: copy.deepcopy(getattr(metric, name)) for name in names}
    metric(3.0)
    metric.compute()
    metric.__dict__.update(fresh)
    metric.update(5.0)
    assert metric.compute() == 5
    assert metric._update_count == 1


def metric_sums():
    metric = torchmetrics.MeanMetric()
    metric.update(3.0)
    assert {name: value.item() for name, value in internals.metric_sums(metric).items()} == {
        "mean_value": 3,
        "weight": 1,
    }


def update_count():
    metric = torchmetrics.MeanMetric()
    assert internals.update_count(metric) == 0
    metric.update(3.0)
    assert internals.update_count(metric) == 1


def set_update_count():
    """torchmetrics warns where a metric that was not updated is computed."""
    metric = torchmetrics.MeanMetric()
    internals.set_update_count(metric, 2)
    assert metric.update_count == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()


def value_of_batch():
    metric = torchmetrics.MeanMetric()
    assert internals.value_of_batch(metric) is None
    metric(3.0)
    metric(5.0)
    assert internals.value_of_batch(metric) == 5


def seen_attentions():
    model = timm.create_model("test_vit", num_classes=0).eval()
    fused = [block.attn.fused_attn for block in model.blocks]
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad(), internals.seen_attentions(model.blocks) as seen:
        while_seen = model(images)
    assert len(seen) == len(model.blocks)
    assert all(one.shape[2:] == (101, 101) for one in seen)
    assert all(torch.allclose(one.sum(dim=3), torch.ones(())) for one in seen)
    assert [block.attn.fused_attn for block in model.blocks] == fused
    with torch.no_grad():
        assert torch.allclose(model(images), while_seen, atol=1e-4)
    assert len(seen) == len(model.blocks)
    with internals.seen_attentions(timm.create_model("test_resnet").layer1) as none:
        assert none == []


CASES = {name: globals()[name] for name in internals.__all__}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_an_internal_of_a_library_still_works(name):
    try:
        CASES[name]()
    except Exception as error:
        versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
        why = getattr(internals, name).__doc__.splitlines()[0]
        pytest.fail(f"{HOME}: `{name}` does not work with {versions}: {type(error).__name__}: {error}\n{why}")


@pytest.mark.parametrize("name", ["ENDPOINT", "HF_HUB_CACHE", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_OFFLINE"])
def test_settings_of_the_hub_that_are_read_or_set_in_its_module_exist(name):
    assert hasattr(constants, name), f"core/hub/ and backbones/weights.py use huggingface_hub.constants.{name}"


#: Private attributes of objects of the libraries. An own class may have one of these names: `self._metadata`.
OF_LIBRARIES = {
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_version", "_metadata"),
    *("_schema", "_C", "_dynamo", "_inductor", "_model_args", "_traits"),
    *("_base", "_opt_called", "_num_samples", "_schedulers", "_last_lr", "_NormBase", "_pg_registry"),
    *("_defaults", "_update_count", "_computed", "_forward_cache"),
}
CHECKED_ROOMS = ("backbones", "core", "heads", "tasks", "data", "cli", "trainer")


def private_uses(tree):
    """Lines that import a private name of a library, or read a private attribute of something that is not `self`."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            names = [part for path in paths if path[0] in LIBRARIES for part in path]
        elif isinstance(node, ast.Attribute) and node.attr in OF_LIBRARIES:
            names = [] if isinstance(node.value, ast.Name) and node.value.id == "self" else [node.attr]
        yield from (f"line {node.lineno}: {name}" for name in names if name.startswith("_"))


@pytest.mark.long
def test_private_names_of_libraries_are_used_in_one_file():
    found = {}
    for path in sorted(path for room in CHECKED_ROOMS for path in (ROOT / room).rglob("*.py")):
        uses = list(private_uses(ast.parse(path.read_text(encoding="utf-8"))))
        if uses:
            found[path.relative_to(ROOT).as_posix()] = uses
    assert found.pop(HOME)
    assert found == {}
