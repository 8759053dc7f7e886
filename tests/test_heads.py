"""The heads: shapes, layers, and what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.zoo import load_zoo
from flashtask.heads import HEADS, build_head


def test_the_linear_head_is_one_affine_map():
    head = build_head("linear", 6, 3)
    (layer,) = head
    features = torch.randn(4, 6)
    torch.testing.assert_close(head(features), features @ layer.weight.T + layer.bias)


def test_the_linear_head_takes_dropout_and_no_bias():
    head = build_head("linear", 6, 3, bias=False, dropout=0.5)
    assert [type(layer) for layer in head] == [nn.Dropout, nn.Linear]
    assert head[1].bias is None


def test_the_mlp_head_has_the_layers_it_was_asked_for():
    head = build_head("mlp", 6, 3, hidden_sizes=[5, 4], dropout=0.1, activation="gelu")
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(5, 6), (4, 5), (3, 4)]
    assert head(torch.zeros(2, 6)).shape == (2, 3)


def test_a_wrong_option_is_an_error_with_the_nearest_one():
    with pytest.raises(UnknownNameError, match="no option of the head 'mlp' named 'hidden_size'") as caught:
        build_head("mlp", 6, 3, hidden_size=[4])
    assert caught.value.suggestions[0] == "hidden_sizes"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"hidden_sizes": 4}, "list of widths"),
        ("mlp", {"hidden_sizes": []}, "list of widths"),
        ("mlp", {"hidden_sizes": [0]}, "at least 1"),
        ("mlp", {"dropout": 1.0}, "dropout"),
        ("mlp", {"activation": "rellu"}, "no activation named 'rellu'"),
        ("linear", {"dropout": -0.1}, "dropout"),
    ],
)
def test_a_bad_value_is_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        build_head(name, 6, 3, **options)


@pytest.mark.parametrize("sizes", [(0, 3), (6, 0), (6, True), (6.0, 3)])
def test_sizes_must_be_whole_numbers_of_at_least_one(sizes):
    with pytest.raises(UsageError, match="whole number of at least 1"):
        build_head("linear", *sizes)


def test_a_module_passes_through_and_takes_no_options():
    module = nn.Linear(6, 3)
    assert build_head(module, 6, 3) is module
    with pytest.raises(UsageError, match="takes no options"):
        build_head(module, 6, 3, dropout=0.1)


def test_a_registered_function_and_class_build_heads_and_anything_else_is_an_error():
    @HEADS.register("test_function_head")
    def function_head(num_features, num_outputs, scale=1.0):
        return nn.Linear(num_features, num_outputs)

    @HEADS.register("test_no_head")
    def no_head(num_features, num_outputs):
        return 3

    try:
        assert build_head("test_function_head", 6, 3, scale=2.0)(torch.zeros(1, 6)).shape == (1, 3)
        with pytest.raises(UsageError, match="built a int"):
            build_head("test_no_head", 6, 3)
    finally:
        HEADS.remove("test_function_head")
        HEADS.remove("test_no_head")


def test_the_zoo_states_the_defaults_that_the_code_has():
    for name, described in load_zoo().heads.items():
        parameters = list(inspect.signature(HEADS.get(name)).parameters.values())[2:]
        defaults = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
        assert described.options == defaults, name
        assert HEADS.entry(name).metadata["description"] == described.description
