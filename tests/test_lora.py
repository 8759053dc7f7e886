"""LoRA: factors beside frozen weights, what a checkpoint keeps of them, and what is left when they are merged."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import SignalAt, state_digest
from test_tasks import small_data
from torch import nn

import flashtask
from flashtask import EMAWeightAveraging, ImageClassifier, LowRank, Phase, Trainer, read_checkpoint
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.trainer.finetuning.lora import adapt, adapted_layers, factor_names, merge, merged_state_dict

ALL = LowRank(2)


def trainer(folder, **options) -> Trainer:
    options = {"max_epochs": 2, "seed": 3, "enable_model_summary": False, **options}
    return Trainer(output_dir=folder, enable_progress_bar=False, **options)


def with_factors(module: nn.Module, settings: LowRank = ALL) -> nn.Module:
    """Adapted, with factors that change something."""
    adapt(module, [module], settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            layer.lora_up.copy_(torch.randn(layer.lora_up.shape, generator=generator))
    return module.eval()


# ---- layers

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "without bias": (lambda: nn.Linear(12, 10, bias=False), (3, 12)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2), (2, 8, 11, 9)),
    "same padding": (lambda: nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect"), (2, 8, 11, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 2), (2, 8, 4, 4, 4)),
    "pointwise": (lambda: nn.Conv2d(16, 12, 1), (2, 16, 5, 5)),
    "groups": (lambda: nn.Conv2d(16, 12, 3, groups=4), (2, 16, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_merged_a_layer_gives_what_it_gave_with_its_factors(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module, inputs = nn.Sequential(make()), torch.randn(shape)
    kind, before = type(module[0]), module(inputs)
    adapt(module, [module], ALL, seed=0)
    assert torch.equal(module(inputs), before), "until they are trained, factors change nothing"
    with_factors(module)
    outputs = module(inputs)
    assert not torch.allclose(outputs, before, atol=1e-2)
    # Whoever reads the weight, instead of calling the layer, gets the sum too.
    plain = make()
    plain.load_state_dict({"weight": module[0].weight, **({"bias": plain.bias} if plain.bias is not None else {})})
    assert torch.equal(module[0].weight, plain.weight)
    assert merge(module) == 1
    assert type(module[0]) is kind
    assert sorted(module.state_dict()) == sorted(nn.Sequential(make()).state_dict())
    torch.testing.assert_close(module(inputs), outputs, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_factors_wherever_the_weight_is_read():
    class Reader(nn.Module):
        """As BEiT and EVA do: the weight of a layer that is never called."""

        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, inputs):
            return nn.functional.linear(inputs, weight=self.qkv.weight)

    module = with_factors(Reader())
    module(torch.randn(2, 8)).sum().backward()
    assert module.qkv.lora_down.grad.abs().sum() > 0
    assert module.qkv.lora_up.grad.abs().sum() > 0


def test_attention_of_torch_is_adapted_too():
    torch.manual_seed(0)
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)})
    inputs = torch.randn(2, 5, 16)
    before = module["attention"](inputs, inputs, inputs)[0]
    with_factors(module)
    assert set(adapted_layers(module)) == {"attention", "attention.out_proj"}
    outputs = module["attention"](inputs, inputs, inputs)[0]
    assert not torch.allclose(outputs, before, atol=1e-2)
    with torch.no_grad():  # its fast path
        torch.testing.assert_close(module["attention"](inputs, inputs, inputs)[0], outputs, rtol=1e-4, atol=1e-4)
    merge(module)
    torch.testing.assert_close(module["attention"](inputs, inputs, inputs)[0], outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "test_byobnet", "test_resnet"])
def test_backbones_of_timm_merged_give_what_they_gave(name):
    """Fused qkv attention, depthwise and grouped convolutions, squeeze and excitation, layer norms."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=0).eval()
    inputs = torch.randn(2, *module.default_cfg["input_size"])
    before = module(inputs)
    with_factors(module, LowRank(2, alpha=0.1))
    depthwise = [n for n, p in module.named_modules() if getattr(p, "groups", 1) == getattr(p, "in_channels", 0) > 1]
    assert not set(depthwise) & set(adapted_layers(module))
    outputs = module(inputs)
    assert not torch.allclose(outputs, before, rtol=1e-3)
    scale = outputs.abs().max()
    merged = timm.create_model(name, num_classes=0).eval()
    merged.load_state_dict(merged_state_dict(module))
    assert ((merged(inputs) - outputs).abs().max() / scale) < 1e-4
    merge(module)
    assert torch.equal(module(inputs), merged(inputs))


def test_what_is_left_out_is_counted_with_the_reason():
    module = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3), nn.Linear(2, 2), nn.Linear(20, 20))
    adaptation = adapt(module, [module], ALL, seed=0)
    assert adaptation.layers == ["1", "3"]
    assert adaptation.parameters == 2 * (16 + 72) + 2 * (20 + 20)
    assert set(adaptation.left_out.values()) == {1}
    assert "depthwise" in str(adaptation)


def test_layers_that_share_their_weight_are_left_out():
    module = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)])
    module[1].weight = module[0].weight
    assert adapt(module, [module], ALL, seed=0).layers == ["2"]


def test_targets_choose_layers_by_their_names_or_the_ends_of_them():
    module = ImageClassifier("timm/test_vit", num_classes=2, pretrained=False)
    blocks = {name.split(".")[2] for name in module.state_dict() if name.startswith("backbone.blocks")}
    adapt(module, [module.backbone], LowRank(2, targets=("qkv", "mlp.fc?")), seed=0)
    expected = {f"backbone.blocks.{n}.{end}" for n in blocks for end in ("attn.qkv", "mlp.fc1", "mlp.fc2")}
    assert set(adapted_layers(module)) == expected
    fresh = ImageClassifier("timm/test_vit", num_classes=2, pretrained=False)
    with pytest.raises(UsageError, match=r"is called 'qkw'(.|\n)*did you mean 'qkv'"):
        adapt(fresh, [fresh.backbone], LowRank(2, targets=("qkw",)), seed=0)


def test_factors_depend_on_the_seed_alone():
    drawn = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        module = net()
        torch.set_rng_state(state)
        adapt(module, [module.backbone], LowRank(1), seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(module.backbone[3].lora_down.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_adapted_module_can_be_copied():
    module = with_factors(net(), LowRank(1))
    again = copy.deepcopy(module)
    merge(again)
    assert len(adapted_layers(module)) == 3
    inputs = torch.randn(4, 4)
    torch.testing.assert_close(again.eval()(inputs), module(inputs))


# ---- a run


def test_only_factors_and_head_change_and_every_other_bit_stays(tmp_path):
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(tmp_path)
    run.finetune(module, *loaders(), strategy="lora:1")
    now = module.state_dict()
    assert {name for name in before if not torch.equal(before[name], now[name])} == {"head.weight", "head.bias"}
    assert set(now) - set(before) == factor_names(module)
    assert all(module.get_parameter(name).abs().sum() > 0 for name in factor_names(module))
    assert run.fit_run.history[0]["trainable_parameters"] == 27 + (4 + 8) + (8 + 8)
    inputs = torch.randn(5, 4)
    outputs = module.eval()(inputs)
    assert module.merge_lora() is module
    assert type(module.backbone[0]) is nn.Linear
    assert sorted(module.state_dict()) == sorted(before)
    torch.testing.assert_close(module(inputs), outputs)


def test_the_backbone_is_in_eval_mode_and_dropout_acts_on_the_factors_alone(tmp_path):
    seen = []

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            layer = self.backbone[3]
            with torch.no_grad():
                layer.lora_up.fill_(1.0)
                first, second = (layer(torch.ones(64, 8)) for _ in range(2))
            seen.append((self.backbone.training, self.backbone[2].training, torch.equal(first, second)))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            with torch.no_grad():
                first, second = (self.backbone[3](torch.ones(64, 8)) for _ in range(2))
            assert torch.equal(first, second)

    strategy = [Phase({"lora": {"rank": 1, "dropout": 0.5}})]
    trainer(tmp_path, max_epochs=1).finetune(Watching(), *loaders(), strategy=strategy)
    assert set(seen) == {(False, False, False)}


def test_a_head_first_and_factors_later(tmp_path):
    run = trainer(tmp_path, max_epochs=2)
    module = net()
    run.finetune(module, *loaders(), strategy=[Phase("head", epochs=1), Phase({"lora": 1})])
    assert [row["trainable_parameters"] for row in run.fit_run.history] == [27, 55]
    assert all(module.get_parameter(name).abs().sum() > 0 for name in factor_names(module))


def test_a_model_with_factors_is_trained_on_with_the_same_or_merged(tmp_path):
    module = net()
    trainer(tmp_path / "a").finetune(module, *loaders(), strategy="lora:1")
    drawn = digest(module)
    trainer(tmp_path / "b").finetune(module, *loaders(), strategy="lora:1")
    assert digest(module) != drawn
    for strategy, message in (("no_freeze", "would not train them"), ("lora:2", "other settings")):
        with pytest.raises(UsageError, match=f"{message}(.|\n)*merge_lora"):
            trainer(tmp_path / strategy.replace(":", "")).finetune(module, *loaders(), strategy=strategy)
    module.merge_lora()
    trainer(tmp_path / "c").finetune(module, *loaders(), strategy="no_freeze")


def test_a_run_with_factors_and_averages_continues_with_the_same_bits(tmp_path):
    digests = []
    for stop in (None, 11):
        folder = tmp_path / str(stop)
        options = {"max_epochs": 3, "accumulate_grad_batches": 2}
        if stop:
            signals = [SignalAt("train_batch_end", stop, signal.SIGTERM), EMAWeightAveraging()]
            with pytest.raises(SystemExit):
                trainer(folder, callbacks=signals, **options).finetune(net(), *loaders(), strategy="lora:1")
        again = trainer(folder, callbacks=EMAWeightAveraging(), **options)
        again.finetune(net(9 if stop else 1), *loaders(), strategy="lora:1", ckpt_path="last" if stop else None)
        digests.append(state_digest(folder / "last.ckpt"))
    assert digests[0] == digests[1]


# ---- files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    model = ImageClassifier("timm/test_vit", pretrained=False, learning_rate=0.05)
    data = small_data(root)
    run = trainer(root / "run", max_epochs=2)
    run.finetune(model, datamodule=data, strategy=("lora", 2, 4), restore_best=False)
    return root, model, data


def test_a_checkpoint_keeps_base_and_factors_apart_and_loads_without_data_or_code(trained):
    root, model, _ = trained
    path = root / "run" / "last.ckpt"
    content = read_checkpoint(path)
    base = set(ImageClassifier("timm/test_vit", num_classes=2, pretrained=False).state_dict())
    assert set(content["state_dict"]) == base | factor_names(model)
    described = content["lora"]
    assert (described["rank"], described["alpha"], set(described["layers"])) == (2, 4, set(adapted_layers(model)))
    loaded = flashtask.load(path)
    images = sorted((root / "val").rglob("*.png"))
    assert loaded.predict(images) == model.predict(images)
    again = ImageClassifier.load_from_checkpoint(path)
    assert digest(again) == digest(model)
    plain = copy.deepcopy(loaded).merge_lora()
    assert set(plain.state_dict()) == base
    for one, other in zip(plain.predict(images), loaded.predict(images), strict=True):
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_a_fresh_model_is_measured_with_the_factors_of_a_checkpoint(trained, tmp_path):
    root, model, data = trained
    run = trainer(tmp_path)
    (own,) = run.validate(model, datamodule=data)
    fresh = ImageClassifier("timm/test_vit", num_classes=2, pretrained=False)
    (read,) = run.validate(fresh, datamodule=data, ckpt_path=root / "run" / "last.ckpt")
    assert read == own
    assert adapted_layers(fresh).keys() == adapted_layers(model).keys()


def test_the_recipe_of_a_run_with_factors_names_the_strategy(trained):
    root, _, _ = trained
    assert read_checkpoint(root / "run" / "last.ckpt")["recipe"]["finetune"]["strategy"] == "lora:2:4"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "damage",
    [
        {"rank": 10**9},
        pytest.param({"rank": True}, marks=pytest.mark.long),
        pytest.param({"rank": "2"}, marks=pytest.mark.long),
        {"alpha": -1},
        pytest.param({"alpha": None, "dropout": 7}, marks=pytest.mark.long),
        {"layers": "qkv"},
        {"layers": ["backbone.nothing"]},
        pytest.param({"layers": ["backbone.norm"]}, marks=pytest.mark.long),
        {"layers": ["backbone.blocks.0.attn.qkv"] * 2},
        pytest.param({"layers": [3]}, marks=pytest.mark.long),
        pytest.param({"targets": 3}, marks=pytest.mark.long),
        {"more": 1},
    ],
)
def test_a_description_that_does_not_fit_the_file_is_refused(trained, tmp_path, damage):
    root, _, _ = trained
    content = read_checkpoint(root / "run" / "last.ckpt")
    content.pop("hyperparameters", None)
    content["lora"] = {**content["lora"], **damage}
    write_checkpoint(tmp_path / "bad.ckpt", content)
    with pytest.raises(IntegrityError, match=r"bad.ckpt: its description of LoRA factors"):
        flashtask.load(tmp_path / "bad.ckpt")


def test_a_description_that_is_no_mapping_is_refused(trained, tmp_path):
    root, _, _ = trained
    content = read_checkpoint(root / "run" / "last.ckpt")
    content.pop("hyperparameters", None)
    content["lora"] = [1]
    write_checkpoint(tmp_path / "bad.ckpt", content)
    with pytest.raises(IntegrityError, match=r"LoRA factors"):
        flashtask.load(tmp_path / "bad.ckpt")


def test_dropout_before_a_layer_that_reads_its_own_weight_is_refused():
    class Own(nn.Linear):
        def forward(self, inputs):
            return nn.functional.linear(inputs, self.weight, self.bias)

    module = nn.Sequential(Own(20, 20))
    with pytest.raises(UsageError, match=r"lora.dropout cannot be applied to 0"):
        adapt(module, [module], LowRank(1, dropout=0.1), seed=0)
    adapt(module, [module], LowRank(1), seed=0)
    assert isinstance(module[0], Own)


def test_a_backbone_without_layers_to_adapt_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"no layer of the backbone can be adapted(.|\n)*lora:1"):
        trainer(tmp_path).finetune(net(), *loaders(), strategy="lora:64")


def test_a_folder_holds_the_merged_weights_and_the_model_keeps_its_factors(trained, tmp_path):
    root, model, _ = trained
    before = digest(model)
    model.save_pretrained(tmp_path / "folder")
    assert digest(model) == before
    again = ImageClassifier.from_pretrained(str(tmp_path / "folder"))
    assert not adapted_layers(again)
    images = sorted((root / "val").rglob("*.png"))
    for one, other in zip(again.predict(images), model.predict(images), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-2)
        assert one.label == other.label


@pytest.mark.long
def test_the_factors_of_a_compiled_backbone_train_and_merge(tmp_path):
    module = net()
    names = set(module.state_dict())
    module.backbone = torch.compile(module.backbone, backend="eager")
    trainer(tmp_path, max_epochs=1).finetune(module, *loaders(), strategy="lora:1")
    assert set(module.state_dict()) - names == factor_names(module)
    outputs = module.eval()(torch.ones(2, 4))
    assert set(merged_state_dict(module)) == names
    module.merge_lora()
    torch.testing.assert_close(module(torch.ones(2, 4)), outputs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_factors_have_the_number_format_of_the_weights(tmp_path, precision):
    module = net()
    run = trainer(tmp_path, max_epochs=1, precision=precision)
    run.finetune(module, *loaders(), strategy="lora:1")
    layer = module.backbone[3]
    assert layer.lora_down.dtype == layer._parameters["weight"].dtype
    assert Net.load_from_checkpoint(tmp_path / "last.ckpt").backbone[3].lora_down.dtype == layer.lora_down.dtype
