import importlib
import json
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from fashion_jax import Batch, FashionMLP, History, Metrics, Run, TrainConfig, calibration, evidence, fit, plot
from fashion_jax.checkpoint import content_digest
from fashion_jax.interop import load_safetensors
from fashion_jax.predict import predict
from fashion_jax.search import Setting, train_settings
from fashion_jax.train import init_state

TINY = TrainConfig(hidden=(8,))
SMALL, WIDE = TrainConfig(hidden=(16,)), TrainConfig(hidden=(32,), weight_decay=0.1)
SETTINGS = {
    "none": Setting(SMALL, 0.0, 2),
    "wide": Setting(WIDE, 0.2, 3),
    "half": Setting(SMALL, 0.5, 2),
    "longer": Setting(SMALL, 0.0, 3),
}


def assert_trees_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def few(small) -> Batch:
    """One batch."""
    return Batch(*(leaf[:64] for leaf in small))


def run_example(name, *flags):
    command = [sys.executable, f"examples/{name}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_each_setting_is_what_fit_trains_with_it(small):
    ends = []
    runs = train_settings(small, small, settings=SETTINGS, seeds=[3, 7], on_epoch=ends.append)
    assert list(runs) == list(SETTINGS)
    # Two rates of one config share their epochs.
    assert len(ends) == 2 + 3 + 3
    for name, setting in SETTINGS.items():
        for lane, seed in enumerate((3, 7)):
            alone = fit(
                small,
                small,
                key=jax.random.key(seed),
                config=setting.config,
                dropout_rate=setting.dropout_rate,
                epochs=setting.epochs,
            )
            found = jax.tree.map(lambda leaf, at=lane: leaf[at], runs[name].history)
            for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(alone.history), strict=True):
                np.testing.assert_allclose(leaf, expected, atol=1e-3)


def test_a_search_goes_on_from_where_it_stopped(small, tmp_path):
    arguments = {"settings": SETTINGS, "seeds": [0, 1]}
    whole = train_settings(small, small, **arguments)

    def interrupt(end):
        if (len(end.dropout_rates), end.epoch) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_settings(small, small, **arguments, on_epoch=interrupt, checkpoint=tmp_path)
    ends = []
    resumed = train_settings(small, small, **arguments, on_epoch=ends.append, checkpoint=tmp_path)
    assert len(ends) == 1 + 3
    for leaf, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [1, 2])
def test_no_program_starts_after_ctrl_c(small, tmp_path, at):
    """In a program's last epoch, too, after which its run is complete."""
    ends = []

    def interrupt(end):
        ends.append(end)
        if end.epoch == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_settings(small, small, settings=SETTINGS, seeds=[0], on_epoch=interrupt, checkpoint=tmp_path)
    assert len(ends) == at
    with pytest.raises(KeyboardInterrupt):
        train_settings(small, small, settings=SETTINGS, seeds=[0], on_epoch=interrupt)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_last_epoch_of_all_is_told(small, tmp_path):
    """Or a script would start its next search."""
    settings = {"one": Setting(TrainConfig(hidden=(8,)), 0.0, 1)}
    with pytest.raises(KeyboardInterrupt):
        train_settings(
            small,
            small,
            settings=settings,
            seeds=[0],
            on_epoch=lambda end: signal.raise_signal(signal.SIGINT),
            checkpoint=tmp_path,
        )
    ends = []
    train_settings(small, small, settings=settings, seeds=[0], on_epoch=ends.append, checkpoint=tmp_path)
    assert not ends


def test_searches_with_other_seeds_share_a_checkpoint_directory(small, tmp_path):
    settings = {"one": Setting(TrainConfig(hidden=(8,)), 0.0, 1)}
    for seed in (0, 1):
        train_settings(small, small, settings=settings, seeds=[seed], checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_functions_of_one_name_do_not_share_a_checkpoint(small, tmp_path):
    def network(width):
        return TrainConfig(model=lambda dropout_rate: FashionMLP((width,), dropout_rate))

    settings = {width: Setting(network(width), 0.0, 1) for width in (4, 8)}
    runs = train_settings(small, small, settings=settings, seeds=[0])
    assert [runs[width].state.params["fc1"]["bias"].shape for width in (4, 8)] == [(1, 4), (1, 8)]
    with pytest.raises(ValueError, match="settings differ in functions of the same name"):
        train_settings(small, small, settings=settings, seeds=[0], checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_order_of_settings_does_not_matter(few, tmp_path):
    settings = {"half": Setting(TINY, 0.5, 1), "none": Setting(TINY, np.float32(0), np.int64(1))}
    runs = train_settings(few, few, settings=settings, seeds=range(2), checkpoint=tmp_path)
    ends = []
    turned = dict(reversed(settings.items()))
    again = train_settings(few, few, settings=turned, seeds=[0, 1], checkpoint=tmp_path, on_epoch=ends.append)
    assert not ends
    assert list(again) == ["none", "half"]
    assert_trees_equal(again, {name: runs[name] for name in again})


def spoiled_by_the_second_step(learning_rate):
    return optax.sgd(lambda step: jax.numpy.where(jax.numpy.less(step, 1), learning_rate, jax.numpy.nan))


def test_a_setting_that_stops_is_named_and_the_others_are_trained(few, tmp_path):
    """With a checkpoint too, and when it goes on from there."""
    bad, later = replace(TINY, learning_rate=1e30), replace(TINY, optimiser=spoiled_by_the_second_step)
    good = {"good": Setting(TINY, 0.2, 3)}
    settings = {"bad": Setting(bad, 0.0, 3), **good, "later": Setting(later, 0.0, 3), "too": Setting(later, 0.5, 3)}
    found = []
    for checkpoint in (None, tmp_path, tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(train_settings(few, few, settings=settings, seeds=[3, 4], checkpoint=checkpoint))
        assert [str(warning.message).partition(" on or ")[0] for warning in caught] == [
            f"settings['{name}']: the loss of 2 of 2 seeds is not finite, from epoch {epoch}"
            for name, epoch in (("bad", 1), ("later", 2), ("too", 2))
        ]
    runs = found[0]
    assert all(content_digest(other) == content_digest(runs) for other in found)
    assert list(runs) == list(settings)
    assert_trees_equal(runs["good"], train_settings(few, few, settings=good, seeds=[3, 4])["good"])
    for name, epochs in (("bad", 0), ("later", 1), ("too", 1)):
        run = runs[name]
        for leaf in jax.tree.leaves(run.history):
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(np.isfinite(leaf), [[epoch < epochs for epoch in range(3)]] * 2)
        assert run.state.step.tolist() == [epochs] * 2
        np.testing.assert_array_equal(run.best.loss, run.history.validation.loss[:, 0] if epochs else [np.inf] * 2)
    for lane, seed in enumerate((3, 4)):
        start = init_state(jax.random.key(seed), config=bad)
        assert_trees_equal(jax.tree.map(lambda leaf, at=lane: leaf[at], runs["bad"].state), start)
        assert_trees_equal(jax.tree.map(lambda leaf, at=lane: leaf[at], runs["bad"].best.params), start.params)


def test_rates_that_are_alike_to_the_program_are_one_lane(few):
    ends = []
    settings = {"a": Setting(TINY, 0.3, 1), "b": Setting(TINY, 0.1 + 0.2, 1), "c": Setting(TINY, np.float32(0.3), 1)}
    runs = train_settings(few, few, settings=settings, seeds=[0], on_epoch=ends.append)
    assert [end.history.running_loss.shape for end in ends] == [(1, 1)]
    assert_trees_equal(runs["b"], runs["a"])
    assert_trees_equal(runs["c"], runs["a"])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "settings must hold at least one Setting, got none"),
        ([Setting(SMALL)], TypeError, "settings must map names to Settings, got list"),
        ({"a": SMALL}, TypeError, r"settings\['a'\] must be a Setting, got TrainConfig"),
        (
            {"a": Setting({"hidden": 1})},
            TypeError,
            r"settings\['a'\]\.config must be a TrainConfig, got \{'hidden': 1\}",
        ),
        ({"a": Setting(None)}, TypeError, r"settings\['a'\]\.config must be a TrainConfig, got None"),
        ({"a": Setting(SMALL, "x")}, TypeError, r"settings\['a'\]\.dropout_rate must be one number"),
        ({"a": Setting(SMALL, 1.0)}, ValueError, r"settings\['a'\]\.dropout_rate must lie in \[0, 1\), got 1\.0"),
        (
            {"a": Setting(replace(SMALL, image_shape=(14, 14)))},
            ValueError,
            r"settings\['a'\] cannot be trained: train\.images must have shape \[n, 14, 14\]",
        ),
        ({"a": Setting(SMALL, 0.0, 0)}, ValueError, r"settings\['a'\]\.epochs must be at least 1, got 0"),
        ({"a": Setting(SMALL, 0.0, 1.0)}, TypeError, r"settings\['a'\]\.epochs must be an int, got 1\.0"),
    ],
)
def test_bad_settings_are_refused(small, tmp_path, settings, error, message, checkpointed, unchecked):
    checkpoint = tmp_path if checkpointed else None
    # After another one, which must not be trained in vain.
    settings = {"fine": Setting(SMALL, 0.0, 2)} | settings if isinstance(settings, dict) and settings else settings
    with pytest.raises(error, match=message):
        train_settings(small, small, settings=settings, seeds=[0], checkpoint=checkpoint, on_epoch=pytest.fail)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("seeds", [1, "01", [0.5]])
def test_bad_seeds_are_refused(small, tmp_path, seeds, checkpointed, unchecked):
    checkpoint = tmp_path if checkpointed else None
    with pytest.raises(TypeError, match="seeds must be"):
        train_settings(small, small, settings=SETTINGS, seeds=seeds, checkpoint=checkpoint)


def test_comparisons_are_paired_by_seed():
    rng = np.random.default_rng(0)
    seeds = rng.standard_normal(20)
    verdicts = [
        evidence.compare("first is higher", seeds + by + 0.01 * rng.standard_normal(20), seeds, quantity="x")
        for by in (0.1, -0.1, 0.0)
    ]
    assert [verdict.answer for verdict in verdicts] == ["supported", "refuted", "undecided"]
    assert evidence.compare("one seed", np.array([1.0]), np.array([0.0]), quantity="x").answer == "undecided"


def test_the_rivals_figure_shows_each_seed_and_interval():
    probabilities = np.full((2, 4), 0.25)
    one = calibration.score(probabilities, np.array([0, 1]))
    scores = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1, leaf + 2]), one)
    situations = {"few": {"nothing": scores, "dropout": scores}, "many": {"nothing": scores, "dropout": scores}}
    figure = plot.rivals(situations, measures={"accuracy": "accuracy", "loss": "NLL"})
    assert all(axes.yaxis.get_inverted() for axes in figure.axes), "the first rival is on top"
    assert len(figure.axes) == 4
    points, bar, mean, *_ = figure.axes[1].lines
    np.testing.assert_array_equal(points.get_xdata(), scores.loss)
    expected = evidence.interval(scores.loss)
    assert list(bar.get_xdata()) == [expected.low, expected.high]
    assert list(mean.get_xdata()) == [expected.mean]
    with pytest.raises(ValueError, match="at least one rival each"):
        plot.rivals({"few": {}}, measures={})


def test_the_rivals_figure_goes_by_names():
    def scored(accuracy):
        return calibration.Scores(np.array(accuracy), *np.zeros((3, 2)), *np.zeros((2, 2, 4)), np.zeros((2, 4, 4), int))

    of = {"no dropout": scored([0.1, 0.2]), "dropout": scored([0.6, 0.7]), "decay": scored([0.3, 0.4])}
    figure = plot.rivals({"few": of, "many": dict(reversed(of.items()))}, measures={"accuracy": "accuracy"})
    first, second = ([(line.get_xdata(), line.get_color()) for line in axes.lines] for axes in figure.axes)
    for (x, colour), (other, like) in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, other)
        assert colour == like
    assert [axes.get_yticklabels()[1].get_text() for axes in figure.axes] == ["dropout", "dropout"]
    colours = [
        line.get_color()
        for line in figure.axes[0].lines
        if str(line.get_marker()) in "os" and len(line.get_xdata()) == 1
    ]
    assert colours[0] == colours[2] != colours[1]
    with pytest.raises(ValueError, match=r"situations\['many'\] must have the names of the first, .*; got \['decay'\]"):
        plot.rivals({"few": of, "many": {"decay": of["decay"]}}, measures={"accuracy": "accuracy"})


def test_the_rivals_example_chooses_on_a_hold_out_and_tests_once(tmp_path):
    # So few images that the network overfits long before the last epoch.
    flags = ("--sizes", 100, "--epochs", 60, "--no-augmented", "--width", 64, "--seeds", 2, "--output", tmp_path)
    result = run_example("when_dropout_helps.py", *flags, "--rivals", "nothing", "dropout")
    assert result.returncode == 0, result.stderr
    assert "2 seeds, which are few" in result.stdout
    assert "Of 6 intervals of 95%, 0.3 are expected to miss the truth." in result.stdout
    results = json.loads((tmp_path / "report.json").read_text())
    assert list(results["test"]) == ["100 images"]
    for title, tried in results["tried"].items():
        assert {len(of) for of in tried.values()} == {3}
        for rival, of in tried.items():
            assert of[results["chosen"][title][rival]] == max(of.values())
    assert all(len(of["accuracy"]) == 2 for rivals in results["test"].values() for of in rivals.values())
    of_rivals = results["test"]["100 images"]
    stopped, last = (np.array(of_rivals[rival]["loss"]) for rival in ("early stopping", "nothing"))
    assert (stopped < last - 0.01).all()
    assert re.fullmatch(r", \d+ of 60 epochs", results["ending"]["100 images"]["fewer epochs"])
    for rival in ("early stopping", "fewer epochs"):
        tried = results["tried"]["100 images"]
        assert all(tried[rival][name] >= 0.9 * accuracy for name, accuracy in tried["nothing"].items())
    assert (tmp_path / "rivals.png").read_bytes().startswith(b"\x89PNG")


def test_the_rivals_example_augments_the_last_set(monkeypatch):
    monkeypatch.syspath_prepend("examples")
    example = importlib.import_module("when_dropout_helps")
    flags = example.Flags(sizes=(100, 200), epochs=(4, 3))
    plain = [(100, 4, False), (200, 3, False)]
    assert example.training_sets(flags) == [*plain, (200, 3, True)]
    assert example.training_sets(replace(flags, augmented=False)) == plain
    for augmented in (False, True):
        rivals = example.candidates(8, 3, 200, augmented)
        configs = [setting.config for settings in rivals.values() for setting in settings.values()]
        assert {(config.flip, config.shift) for config in configs} == {(augmented, int(augmented))}


def test_the_rivals_example_chooses_no_setting_that_stopped(monkeypatch):
    monkeypatch.syspath_prepend("examples")
    example = importlib.import_module("when_dropout_helps")
    nan = float("nan")
    assert example.highest({"stopped": nan, "worse": 0.1, "best": 0.9, "stopped too": nan}) == "best"
    curve = np.array([[0.1, 0.2, nan], [0.1, 0.2, 0.3]])
    history = History(curve, Metrics(curve, curve), Metrics(curve, curve))
    runs = {("nothing", "stopped"): Run(None, history, None)}
    found = example.stopped({"stopped": Setting(SMALL, 0.0, 3)}, runs)
    assert all(np.isnan(of["stopped"][0]) for of in found.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sizes", 500, 600), "--sizes and --epochs must name one number each"),
        (("--sizes", 200, 60_000, "--epochs", 1, 1), r"--sizes must lie between 1 and 50,000, and none twice"),
        (("--sizes", 200, 200, "--epochs", 1, 2), r"--sizes must lie between 1 and 50,000, and none twice"),
        (("--sizes", 200, 300, "--epochs", 1, 0), r"--epochs must be at least 1, got \(1, 0\)"),
    ],
)
def test_the_rivals_example_refuses_bad_flags_before_training(tmp_path, call, flags, message):
    refused = call(Path("examples/when_dropout_helps.py"), *flags, "--output", tmp_path)
    assert refused.returncode == 1
    assert re.search(f"error: {message}", refused.stderr)
    assert "epoch 1/" not in refused.stderr


def test_the_best_perceptron_is_chosen_on_a_hold_out_and_can_be_read_back(tmp_path, call):
    recipes = [f"dropout {rate}; mirrored, moved, decay 0.1" for rate in (0, 0.1)]
    flags = ("--epochs", 2, "--seeds", 1, "--train-size", 600, "--output", tmp_path)
    result = run_example("best_perceptron.py", *flags, "--recipes", *recipes)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "report.json").read_text())
    assert list(results["tried"]) == recipes
    accuracies = {name: of["accuracy"][-1] for name, of in results["tried"].items()}
    assert accuracies[results["chosen"]] == max(accuracies.values())
    network = load_safetensors(tmp_path / "network-0.safetensors")
    assert network.config.as_dict() == results["config"]
    assert network.dropout_rate == results["dropout_rate"]
    from fashion_jax import load

    test = load().test
    right = predict(network.params, test.images, config=network.config).argmax(axis=1) == test.labels
    assert right.mean() == pytest.approx(results["test"]["accuracy"][0], abs=1e-9)
    refused = call(Path("examples/best_perceptron.py"), "--recipes", "none", "--output", tmp_path)
    assert refused.returncode == 1
    assert "error: --recipes must be some of" in refused.stderr
