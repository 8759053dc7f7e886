"""Heads that are solved: right answers in every corner, checked against other ways to the same numbers."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import nn

from flashtask.core.errors import BadDataError, UnknownNameError, UsageError
from flashtask.heads import build_head
from flashtask.heads.closed_form import ClosedFormHead, best_scale, sample_weights
from flashtask.heads.ridge import _Ridge

SOLVED = [
    ("prototype", {}),
    ("prototype", {"distance": "euclidean"}),
    ("ridge", {}),
    ("ridge", {"balanced": True}),
    ("logistic", {}),
    ("logistic", {"balanced": True}),
]
each_head = pytest.mark.parametrize(("name", "options"), SOLVED, ids=lambda value: str(value))


def blobs(samples=60, features=5, classes=3, spread=0.7, seed=0):
    """Overlapping clouds of points, one around a centre for each class; float32 as a backbone gives them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % classes
    centres = torch.randn(classes, features, generator=generator) * 2
    return centres[targets] + spread * torch.randn(samples, features, generator=generator), targets


def solved(name, features, targets, classes, **options):
    head = build_head(name, features.shape[1], classes, **options)
    head.said = head.solve(features, targets)
    return head


def probabilities(head, features):
    return head(features).detach().softmax(dim=1)


# ---- every solved head


@each_head
def test_a_solved_head_separates_clouds_and_is_as_sure_as_it_is_right(name, options):
    features, targets = blobs(1000, spread=1.5)
    head = solved(name, features[:500], targets[:500], 3, **options)
    found = probabilities(head, features[500:])
    confidence, predicted = found.max(dim=1)
    accuracy = float((predicted == targets[500:]).float().mean())
    assert accuracy > 0.85
    assert float(confidence.mean()) == pytest.approx(accuracy, abs=0.06)
    assert isinstance(head, ClosedFormHead)
    assert head.said.startswith(f"{name}: ")


@each_head
def test_solving_again_gives_the_same_bits_and_forgets_what_was_there(name, options):
    features, targets = blobs()
    once = solved(name, features, targets, 3, **options)
    twice = solved(name, features.flip(1) * 3, targets, 3, **options)
    twice.solve(features, targets)
    for key, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[key]), key


@each_head
def test_a_head_is_uniform_before_it_is_solved(name, options):
    found = probabilities(build_head(name, 4, 5, **options), torch.randn(3, 4))
    torch.testing.assert_close(found, torch.full((3, 5), 0.2))


@each_head
def test_the_order_of_samples_does_not_matter(name, options):
    features, targets = blobs(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    one = solved(name, features, targets, 3, **options)
    other = solved(name, features[order], targets[order], 3, **options)
    torch.testing.assert_close(probabilities(one, features), probabilities(other, features), atol=1e-4, rtol=0)


@each_head
def test_a_class_without_samples_is_told_and_never_predicted(name, options):
    features, targets = blobs(classes=2)
    targets = targets * 2  # the classes 0 and 2 of four
    head = solved(name, features, targets, 4, **options)
    found = probabilities(head, torch.cat([features, 3 * features, -features]))
    assert set(found.argmax(dim=1).tolist()) <= {0, 2}
    assert float(found[:, [1, 3]].max()) < 0.3
    assert found.isfinite().all()
    assert "2 of 4 classes have no sample" in head.said
    assert "have no sample" not in solved(name, *blobs(classes=2), 2, **options).said


@each_head
def test_one_sample_a_class_is_enough(name, options):
    features, targets = blobs(4, classes=4)
    head = solved(name, features, targets, 4, **options)
    assert probabilities(head, features).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert all(value.isfinite().all() for value in head.state_dict().values())


@each_head
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_fewest_samples_give_finite_weights(name, options, samples):
    features, targets = blobs(samples, classes=2)
    head = solved(name, features, targets, 2, **options)
    assert all(value.isfinite().all() for value in head.state_dict().values())
    assert torch.equal(head(features).argmax(dim=1), targets)


@each_head
def test_samples_that_are_all_alike_give_the_shares_of_their_classes_or_nothing(name, options):
    features, targets = torch.full((8, 3), 0.1), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = probabilities(solved(name, features, targets, 2, **options), features)
    torch.testing.assert_close(found, torch.full((8, 2), 0.5), atol=1e-4, rtol=0)


@each_head
def test_a_constant_feature_changes_nothing(name, options):
    features, targets = blobs()
    with_constant = torch.cat([features, torch.full((60, 1), 0.1), torch.zeros(60, 1)], dim=1)
    if name == "ridge":  # its grid is a share of the mean over all features
        options = {**options, "penalty": 1.0}
    one, other = solved(name, features, targets, 3, **options), solved(name, with_constant, targets, 3, **options)
    torch.testing.assert_close(one(features), other(with_constant), atol=1e-4, rtol=1e-4)
    if name != "prototype":
        assert other[0].weight[:, 5:].abs().max() < 1e-6


@each_head
def test_samples_that_stand_twice_count_twice(name, options):
    features, targets = blobs(30)
    head = solved(name, torch.cat([features, features]), torch.cat([targets, targets]), 3, **options)
    assert float((probabilities(head, features).argmax(dim=1) == targets).float().mean()) > 0.9


@each_head
def test_more_features_than_samples_are_fine(name, options):
    features, targets = blobs(24, features=200, spread=3.0)
    head = solved(name, features, targets, 3, **options)
    assert torch.equal(head(features).argmax(dim=1), targets)


@each_head
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_an_error(name, options, value):
    features, targets = blobs()
    features[7, 2] = value
    with pytest.raises(BadDataError, match="features of 1 of 60 samples are NaN or infinite") as caught:
        solved(name, features, targets, 3, **options)
    assert caught.value.exit_code == 65


@each_head
@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), r"\(samples, 3\)"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), r"\(samples, 3\)"),
        (torch.zeros(4, 3), torch.zeros(4), "class index"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), "class index"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 1]), "class indices are 0 to 2, but the head has 2"),
        (torch.zeros(4, 3), torch.tensor([0, 1, -1, 1]), "class indices are -1 to 1"),
    ],
)
def test_what_cannot_be_solved_on_is_refused(name, options, features, targets, message):
    with pytest.raises(UsageError, match=message):
        build_head(name, 3, 2, **options).solve(features, targets)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"scale": 0}, "scale of the head 'cosine'"),
        ("cosine", {"scale": math.inf}, "above 0"),
        ("prototype", {"temperature": -1.0}, "temperature of the head 'prototype'"),
        ("ridge", {"penalty": 0}, "penalty of the head 'ridge'"),
        ("ridge", {"temperature": "x"}, "temperature of the head 'ridge'"),
        ("logistic", {"penalty": 0}, "penalty of the head 'logistic'"),
        ("logistic", {"tolerance": None}, "not None"),
        ("logistic", {"tolerance": 0.0}, "tolerance of the head 'logistic'"),
        ("logistic", {"max_iterations": 0}, "max_iterations"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        build_head(name, 3, 2, **options)


def test_a_wrong_distance_is_told_with_the_nearest():
    with pytest.raises(UnknownNameError, match="no distance named 'cosin'") as caught:
        build_head("prototype", 3, 2, distance="cosin")
    assert caught.value.suggestions == ["cosine"]


# ---- cosine


def test_the_cosine_head_looks_at_directions_alone():
    head, features = build_head("cosine", 6, 3, scale=10.0), torch.randn(4, 6)
    expected = 10 * nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(7 * features), head(features))
    assert head(torch.zeros(1, 6)).isfinite().all()
    assert {name for name, _ in head.named_parameters()} == {"weight", "log_scale"}
    assert {name for name, _ in build_head("cosine", 6, 3, learn_scale=False).named_parameters()} == {"weight"}


def test_the_cosine_head_learns_directions_and_its_scale():
    features, targets = blobs()
    torch.manual_seed(0)
    head = build_head("cosine", 5, 3, scale=5.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), targets).backward()
        optimizer.step()
    assert float((head(features).argmax(dim=1) == targets).float().mean()) > 0.9
    assert float(head.log_scale.detach().exp()) > 5.0


# ---- prototype


def test_euclidean_prototypes_are_the_class_means_whatever_the_balance():
    features, targets = blobs(60)
    kept = torch.cat([torch.nonzero(targets == 0)[:20, 0], torch.nonzero(targets == 1)[:2, 0]])
    head = solved("prototype", features[kept], targets[kept], 2, distance="euclidean", temperature=1.0)
    means = torch.stack([features[kept][targets[kept] == c].mean(dim=0) for c in (0, 1)])
    nearest = torch.cdist(features, means).argmin(dim=1)
    assert torch.equal(head(features).argmax(dim=1), nearest)
    torch.testing.assert_close(head.prototypes + head.center, means)


def test_cosine_prototypes_do_not_see_a_common_offset_or_the_length():
    features, targets = blobs()
    one, other = (solved("prototype", 2 * features + offset, targets, 3) for offset in (0.0, 50.0))
    torch.testing.assert_close(one(2 * features), other(2 * features + 50.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_given_temperature_divides(distance):
    features, targets = blobs()
    one, two = (solved("prototype", features, targets, 3, distance=distance, temperature=t) for t in (1.0, 2.0))
    torch.testing.assert_close(one(features), 2 * two(features))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_temperature_comes_from_samples_that_are_not_in_their_own_mean(distance):
    """On noise in many dimensions a sample is near a mean that holds it, and that must not make the head sure."""
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(20, 400, generator=generator), torch.arange(20) % 4
    head = solved("prototype", features, targets, 4, distance=distance)
    fresh = torch.randn(50, 400, generator=generator)
    assert float(probabilities(head, fresh).max(dim=1).values.mean()) < 0.35


# ---- ridge


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("features", [4, 40])
def test_leave_one_out_is_exactly_that(features, balanced):
    """The short formula against the long way: each sample left out, and the regression solved anew."""
    inputs, targets = blobs(15, features=features)
    targets[:5] = 0
    values, weights = nn.functional.one_hot(targets, 3).double(), sample_weights(targets, 3, balanced=balanced)
    problem = _Ridge(inputs.double(), values, weights)
    assert problem.is_dual == (features == 40)
    expected = []
    for index in range(15):
        others = torch.arange(15) != index
        design = torch.cat([inputs.double(), torch.ones(15, 1)], dim=1)
        penalty = 0.7 * torch.eye(features + 1, dtype=torch.float64)
        penalty[-1, -1] = 0
        left = design[others].T * weights[others]
        expected.append(design[index] @ torch.linalg.solve(left @ design[others] + penalty, left @ values[others]))
    torch.testing.assert_close(problem.left_out(0.7), torch.stack(expected), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("features", [4, 40])
def test_ridge_is_the_solution_of_its_equations(features):
    inputs, targets = blobs(15, features=features)
    head = solved("ridge", inputs, targets, 3, penalty=0.5, temperature=1.0)
    centred = inputs.double() - inputs.double().mean(dim=0)
    values = nn.functional.one_hot(targets, 3).double()
    gram = centred.T @ centred + 0.5 * torch.eye(features, dtype=torch.float64)
    slopes = torch.linalg.solve(gram, centred.T @ (values - values.mean(dim=0)))
    torch.testing.assert_close(head[0].weight.double().T, slopes, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head(inputs).double(), values.mean(dim=0) + centred @ slopes, atol=1e-5, rtol=1e-5)


def test_primal_and_dual_agree():
    """Columns of zeros make it the dual, and change nothing else."""
    inputs, targets = blobs(15, features=4)
    wide = torch.cat([inputs, torch.zeros(15, 30)], dim=1)
    one, other = solved("ridge", inputs, targets, 3, penalty=0.5), solved("ridge", wide, targets, 3, penalty=0.5)
    torch.testing.assert_close(one(inputs), other(wide), atol=1e-5, rtol=1e-5)


def test_the_penalty_grows_with_noise_and_not_with_the_unit_of_the_features():
    def chosen(features, targets):
        return float(solved("ridge", features, targets, 3).said.split("penalty ")[1].split()[0])

    clean, targets = blobs(spread=0.1)
    noisy, _ = blobs(spread=4.0)
    assert chosen(noisy, targets) > 100 * chosen(clean, targets)
    assert chosen(1000 * noisy, targets) == pytest.approx(1e6 * chosen(noisy, targets), rel=0.01)


def test_balance_moves_ridge_and_logistic_towards_the_rare_class():
    features, targets = blobs(200, classes=2, spread=3.0)
    kept = torch.cat([torch.nonzero(targets == 0)[:, 0], torch.nonzero(targets == 1)[:10, 0]])
    for name in ("ridge", "logistic"):
        plain = probabilities(solved(name, features[kept], targets[kept], 2), features)[:, 1].mean()
        balanced = probabilities(solved(name, features[kept], targets[kept], 2, balanced=True), features)[:, 1].mean()
        assert plain < 0.35
        assert balanced > plain + 0.05


# ---- logistic


def by_newton(features, targets, penalty, steps=30):
    """The same objective by Newton's method on torch's own Hessian; features are standardised already."""
    width = features.shape[1]
    classes = int(targets.max()) + 1

    def objective(flat):
        weight, bias = flat[: classes * width].view(classes, width), flat[classes * width :]
        logits = features @ weight.T + bias
        return nn.functional.cross_entropy(logits, targets, reduction="sum") + penalty / 2 * weight.square().sum()

    flat = torch.zeros(classes * (width + 1), dtype=torch.float64)
    for _ in range(steps):
        slope = torch.autograd.functional.jacobian(objective, flat)
        # The sum of the biases changes nothing, so the Hessian is singular there alone.
        flat = flat - torch.linalg.pinv(torch.autograd.functional.hessian(objective, flat)) @ slope
    assert slope.abs().max() < 1e-8
    return features @ flat[: classes * width].view(classes, width).T + flat[classes * width :]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_logistic_finds_the_optimum_that_newtons_method_finds(penalty):
    features, targets = blobs(60, spread=2.0)
    features = features * torch.tensor([1.0, 100.0, 0.01, 5.0, 1.0]) + 7
    standard = features.double() - features.double().mean(dim=0)
    standard = standard / standard.std(dim=0, correction=0)
    head = solved("logistic", features, targets, 3, penalty=penalty, tolerance=1e-8)
    expected = by_newton(standard, targets, penalty).softmax(dim=1)
    torch.testing.assert_close(probabilities(head, features).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_logistic_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, targets = blobs(60, spread=2.0)
    standard = StandardScaler().fit_transform(features.numpy())
    theirs = LogisticRegression(C=1 / 0.5, tol=1e-8, max_iter=1000).fit(standard, targets.numpy())
    ours = solved("logistic", features, targets, 3, penalty=0.5, tolerance=1e-8)
    expected = torch.from_numpy(theirs.predict_proba(standard)).float()
    torch.testing.assert_close(probabilities(ours, features), expected, atol=1e-4, rtol=0)


def test_logistic_reaches_its_tolerance_or_says_that_it_did_not():
    features, targets = blobs(60, spread=2.0)
    fine = solved("logistic", features, targets, 3, tolerance=1e-9)
    assert float(fine.said.split("largest gradient ")[1]) <= 1e-9
    short = solved("logistic", features, targets, 3, max_iterations=2)
    assert "2 iterations" in short.said
    assert "above the tolerance of 1.0e-06" in short.said


def test_the_penalty_of_logistic_grows_with_the_number_of_features():
    assert "penalty 5," in solved("logistic", *blobs(features=50), 3).said
    features, targets = blobs(60, spread=2.0)
    given, taken = (solved("logistic", features, targets, 3, penalty=each) for each in (0.5, None))
    torch.testing.assert_close(given(features), taken(features))


def test_classes_that_can_be_separated_have_an_optimum_too():
    features, targets = blobs(60, spread=0.01)
    head = solved("logistic", features, targets, 3)
    assert "above the tolerance" not in head.said
    assert 0.8 < float(probabilities(head, features).max(dim=1).values.mean()) < 1.0


# ---- temperature


def test_the_best_scale_has_the_least_cross_entropy():
    scores = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.distributions.Categorical(logits=4 * scores).sample()
    scale = best_scale(scores, targets)
    around = [nn.functional.cross_entropy(scores * each, targets) for each in (0.97 * scale, scale, 1.03 * scale)]
    assert around[1] < min(around[0], around[2])
    assert best_scale(scores, scores.argmax(dim=1)) == pytest.approx(100, rel=1e-3)
    assert best_scale(scores[:0], targets[:0], otherwise=3.0) == 3.0
