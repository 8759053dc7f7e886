"""Finding backbones and heads: by a pattern, and by what their sources say of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torchvision.models import get_model_weights

from flashtask import BACKBONES, HEADS, build_backbone
from flashtask.backbones import search as sizes
from flashtask.backbones.building import build_without_values
from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.registry import Registry, RegistryEntry
from flashtask.core.registry_search import is_expression


def found(pattern="", **filters):
    return [entry.name for entry in BACKBONES.search(pattern, **filters)]


@pytest.mark.parametrize(
    ("pattern", "admitted", "refused"),
    [
        ("ResNet18", {"timm/resnet18", "torchvision/resnet18", "timm/seresnet18"}, {"timm/resnet34"}),
        ("resnet(18|34)", {"timm/resnet18", "timm/resnet34", "torchvision/resnet34"}, {"timm/seresnet18"}),
        ("timm/resnet18d?", {"timm/resnet18", "timm/resnet18d"}, {"torchvision/resnet18"}),
        ("RESNET.*", {"timm/resnet18"}, {"timm/seresnet18"}),
        ("efficientnet_lite0", {"efficientnet_lite0", "timm/efficientnet_lite0"}, {"timm/efficientnet_lite1"}),
    ],
)
def test_a_pattern_is_a_part_of_a_name_or_an_expression_for_the_whole(pattern, admitted, refused):
    names = set(found(pattern))
    assert admitted <= names
    assert not refused & names
    assert is_expression(pattern) == (pattern.lower() not in ("resnet18", "efficientnet_lite0"))


def test_without_a_pattern_and_filters_everything_is_found_in_order():
    assert found() == BACKBONES.names()
    assert [entry.name for entry in HEADS.search()] == HEADS.names()


def test_the_licence_is_that_of_the_default_weights():
    assert get_pretrained_cfg("convnextv2_tiny.fcmae").license == "cc-by-nc-4.0"
    names = found("convnextv2_tiny.*", licence="CC-BY-NC-4.0")
    assert names == ["convnextv2_tiny_fcmae", "timm/convnextv2_tiny"]
    assert found("convnextv2_tiny.*", licence="mit") == []
    assert "licence" not in BACKBONES.entry("torchvision/resnet18").known(), "torchvision states none for its weights"


@pytest.mark.long
def test_the_input_size_is_that_of_the_weights():
    assert found("timm/vit_base_patch16_.*", input_size=384, source="timm") != []
    for name in found("vit_small_.*", input_size=(224, 224))[:5]:
        assert build_without_values(name).preprocessing.input_size[1:] == (224, 224)
    assert "torchvision/inception_v3" in found("inception", input_size=299)
    assert found("inception", input_size=(3, 299, 298)) == []


def test_what_has_weights_is_known_without_building_it():
    without = set(found("resnet.*", pretrained=False, source="timm"))
    assert without == {f"timm/{n}" for n in timm.list_models("resnet*") if not get_pretrained_cfg(n).has_weights}
    assert without
    assert not without & set(found("resnet.*", pretrained=True))


def test_cached_means_that_the_file_is_on_this_machine(tmp_path, monkeypatch):
    from huggingface_hub import constants

    assert "efficientnet_lite0" in found(cached=True, source="zoo")
    assert found("resnet18", cached=True) == []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    file = tmp_path / "torch" / "checkpoints" / get_model_weights("resnet34")["DEFAULT"].url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    assert found("resnet(18|34)", cached=True) == ["timm/resnet18", "torchvision/resnet34"]
    assert "timm/resnet18" not in found("resnet18", cached=False)


def test_parameters_are_counted_without_a_classifier_once_and_remembered():
    names = found("resnet(18|34)", max_params=12e6)
    assert names == ["timm/resnet18", "torchvision/resnet18"]
    module = build_backbone("resnet18", pretrained=False).module
    count = sum(parameter.numel() for parameter in module.parameters())
    assert found("timm/resnet(18|34)", min_params=count, max_params=count) == ["timm/resnet18"]
    (file,) = (cache_folder() / "backbone_sizes").glob("timm-*.json")
    assert file.name == f"timm-{timm.__version__}.json"
    assert json.loads(file.read_text())["sizes"]["timm/resnet18"]["num_params"] == count
    changed = json.loads(file.read_text())
    changed["sizes"]["timm/resnet18"]["num_params"] = 1
    file.write_text(json.dumps(changed))
    assert found("timm/resnet18", max_params=1) == ["timm/resnet18"], "what is remembered is not counted again"
    file.unlink()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        "[]",
        '{"format": 9, "sizes": {}}',
        '{"format": 1, "sizes": {"timm/test_resnet": 3}}',
        '{"format": 1, "sizes": {"timm/test_resnet": {"num_params": -1, "num_features": 1, "num_layers": 1}}}',
        '{"format": 1, "sizes": {"timm/test_resnet": {"num_params": true, "num_features": 1, "num_layers": 1}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_memory_is_counted_and_written_anew(text):
    entries = [BACKBONES.entry("test_resnet")]
    file = cache_folder() / "backbone_sizes" / f"timm-{timm.__version__}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    assert sizes.remembered_sizes(entries) == {}
    size = sizes.sizes_of(entries)["timm/test_resnet"]
    assert size.num_params == sum(p.numel() for p in build_without_values("test_resnet").module.parameters())
    assert sizes.remembered_sizes(entries) == {"timm/test_resnet": size}


def test_a_memory_that_cannot_be_written_costs_counting_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "file"))
    assert found("timm/test_resnet", max_params=1e6) == ["timm/test_resnet"]


def test_what_is_not_known_passes_no_filter():
    def tiny(pretrained: bool = True, in_chans: int = 3) -> nn.Module:
        return nn.Conv2d(in_chans, 4, 3)

    def needs_values(pretrained: bool = True, in_chans: int = 3) -> nn.Module:
        return nn.Conv2d(in_chans, int(torch.ones(1).sum()), 3)

    BACKBONES.register("own_tiny", tiny, input_size=[3, 8, 8])
    BACKBONES.register("own_other", needs_values)
    try:
        assert found("own_.*") == ["own_tiny", "own_other"]
        assert found("own_.*", input_size=8) == ["own_tiny"]
        assert found("own_.*", licence="mit") == []
        assert found("own_.*", max_params=200) == ["own_tiny"], "the other cannot be built without values"
        assert found("own_.*", max_params=111) == []
        assert found("own_.*", source="user") == ["own_tiny", "own_other"]
    finally:
        BACKBONES.remove("own_tiny")
        BACKBONES.remove("own_other")


@pytest.mark.parametrize(
    ("filters", "kind", "near"),
    [
        ({"max_parms": 3}, "no filter of backbones named 'max_parms'", "max_params"),
        ({"licence": "apache2.0"}, "no licence named 'apache2.0'", "apache-2.0"),
        ({"source": "torch-vision"}, "no source of backbones named 'torch-vision'", "torchvision"),
    ],
)
def test_a_mistyped_filter_or_value_is_answered_with_the_nearest(filters, kind, near):
    with pytest.raises(UnknownNameError, match=kind) as caught:
        BACKBONES.search("resnet18", **filters)
    assert near in caught.value.suggestions


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"input_size": "224"}, "input_size cannot be '224'"),
        ({"input_size": True}, "input_size cannot be True"),
        ({"pretrained": "yes"}, "pretrained must be True or False, not 'yes'"),
        ({"max_params": 0}, "max_params must be a number of parameters above 0, not 0"),
        ({"min_params": float("nan")}, "min_params must be a number of parameters above 0"),
    ],
)
def test_a_value_that_a_filter_cannot_take_is_refused(filters, message):
    with pytest.raises(UsageError, match=message):
        BACKBONES.search("resnet18", **filters)


def test_a_broken_expression_says_what_is_wrong():
    with pytest.raises(UsageError, match="is not a regular expression") as caught:
        BACKBONES.search("resnet(18")
    assert "parenthesis" in caught.value.why or "unterminated" in caught.value.why


def test_a_registry_of_ones_own_has_the_filters_of_its_metadata():
    registry = Registry("fruit")
    registry.register("apple", print, licence="MIT", provider="orchard 1.0")
    registry.register("pear", print)
    assert [entry.name for entry in registry.search(licence="mit")] == ["apple"]
    assert [entry.name for entry in registry.search("p", source="orchard")] == ["apple"]
    assert registry.filters() == ["source", "licence"]
    with pytest.raises(UnknownNameError):
        registry.search(cached=True)


def test_facts_are_asked_for_only_by_filters_that_need_them():
    class Costly:
        asked = 0

        def names(self):
            return ["one"]

        spellings = names

        def find(self, name):
            return RegistryEntry("one", "thing", {"provider": "x"}, print, self.learn) if name == "one" else None

        def learn(self):
            self.asked += 1
            return {"licence": "mit"}

    registry, source = Registry("thing"), Costly()
    registry.add_source(source)
    registry.search("o", source="x")
    assert source.asked == 0
    assert [entry.name for entry in registry.search(licence="mit")] == ["one"]
    assert source.asked == 1


def test_searching_by_name_and_source_loads_no_library():
    code = (
        "import sys; from flashtask.backbones import BACKBONES;"
        "n = len(BACKBONES.search('resnet.*', source='torchvision'));"
        "print(n > 4, {'torch', 'timm', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "True set()"
