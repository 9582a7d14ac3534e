"""What a person sees: figures, tables, progress, files, and the example that makes them all."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fashion_jax import History, Metrics, TrainConfig, evidence, log, plot, report
from fashion_jax.config import TrainConfig as Config
from fashion_jax.files import write_atomically
from fashion_jax.log import Progress
from fashion_jax.train import EpochEnd, init_state

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = EXAMPLES / "compare_overfit.py"
REFERENCE = Path(__file__).parent / "reference" / "pytorch_curves.csv"


def history(runs=3, epochs=5) -> History:
    rng = np.random.default_rng(0)
    leaves = rng.uniform(0.2, 0.5, (5, runs, epochs))
    return History(leaves[0], Metrics(leaves[1], leaves[2]), Metrics(leaves[3], leaves[4]))


def pixels(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=50)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def test_losses_draws_mean_band_and_best_epoch():
    arms = {"no dropout": history(), "dropout 0.2": history()}
    figure = plot.losses(arms)
    assert [axes.get_title() for axes in figure.axes] == list(arms)
    for axes in figure.axes:
        *curves, best = axes.lines
        expected = [arms["no dropout"].running_loss, arms["no dropout"].train.loss, arms["no dropout"].validation.loss]
        for line, leaf in zip(curves, expected, strict=True):
            np.testing.assert_allclose(line.get_ydata(), leaf.mean(axis=0))
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
        mean = expected[-1].mean(axis=0)
        assert best.get_xdata()[0] == mean.argmin() + 1
        assert best.get_ydata()[0] == mean.min()
        band = axes.collections[-1].get_paths()[0].vertices[:, 1]
        sd = expected[-1].std(axis=0, ddof=1)
        assert band.max() == pytest.approx((mean + sd).max())
        assert len({line.get_linestyle() for line in curves}) == 3
        assert axes.get_xlabel() == "epoch"
    assert "mean ± sd of 3 runs" in figure.axes[0].get_ylabel()
    assert figure.axes[-1].get_legend() is not None
    assert pixels(figure).std() > 0


def test_losses_of_one_run_have_no_band():
    one = jax.tree.map(lambda leaf: leaf[0], history())
    axes = plot.losses({"one": one}).axes[0]
    assert not axes.collections
    assert axes.get_ylabel() == "loss (nats)"


def test_losses_leaves_out_runs_that_did_not_stay_finite():
    arm = history()
    stopped = jax.tree.map(lambda leaf: np.where(np.indices(leaf.shape).sum(axis=0) < 2, leaf, np.nan), arm)
    stopped = jax.tree.map(lambda leaf, whole: np.concatenate([leaf[:1], whole[1:]]), stopped, arm)
    figure = plot.losses({"arm": stopped, "whole": arm})
    axes, mean = figure.axes[0], arm.validation.loss[1:].mean(axis=0)
    np.testing.assert_allclose(axes.lines[2].get_ydata(), mean)
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told[-1] == f"lowest validation: {mean.min():.3f}, epoch {mean.argmin() + 1}"
    assert [axes.get_title() for axes in figure.axes] == ["arm (finite runs: 2 of 3)", "whole"]
    assert axes.get_ylabel() == "loss (nats), mean ± sd"
    one = jax.tree.map(lambda leaf: leaf[0], stopped)
    axes = plot.losses({"arm": one}).axes[0]
    assert axes.get_title() == "arm (finite runs: 0 of 1)"
    best = int(np.nanargmin(one.validation.loss))
    assert axes.get_legend().get_texts()[-1].get_text() == (
        f"lowest validation: {one.validation.loss[best]:.3f}, epoch {best + 1}"
    )
    nothing = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), arm)
    assert len(plot.losses({"arm": nothing}).axes[0].get_legend().get_texts()) == 3


def test_losses_refuses_other_axes():
    with pytest.raises(ValueError, match="at least one History"):
        plot.losses({})
    deep = jax.tree.map(lambda leaf: leaf[None], history())
    with pytest.raises(ValueError, match=r"\[epochs\] or \[runs, epochs\]"):
        plot.losses({"deep": deep})


def test_classification_draws_ten_bars(splits):
    probabilities = np.full(10, 0.02)
    probabilities[3] = 0.82
    names = [str(i) for i in range(10)]
    figure = plot.classification(splits.test.images[0], probabilities, class_names=names, label=9)
    picture, bars = figure.axes
    np.testing.assert_array_equal(picture.images[0].get_array(), splits.test.images[0])
    assert [bar.get_width() for bar in bars.patches] == probabilities.tolist()
    assert bars.get_title() == "prediction: 3"
    assert picture.get_title() == "label: 9"
    pixels(figure)
    with pytest.raises(ValueError, match="class_names must name 10 classes, got 2"):
        plot.classification(splits.test.images[0], probabilities, class_names=["a", "b"])


def test_image_sheet_lays_images_row_by_row(splits):
    images = splits.train.images[:7]
    sheet = plot.image_sheet(images, columns=3).axes[0].images[0].get_array()
    assert sheet.shape == (84, 84)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(sheet[row * 28 :, column * 28 :][:28, :28], image)
    assert (sheet[56:, 28:] == 0).all()
    with pytest.raises(ValueError, match="n at least 1"):
        plot.image_sheet(images[:0], columns=3)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        plot.image_sheet(images, columns=0)


def test_figures_need_no_display_and_no_global_state():
    code = """
import io, sys
import matplotlib, numpy as np
from fashion_jax import plot
names = set(matplotlib.rcParams) - {"backend"}  # Reading the backend loads pyplot.
before = {name: matplotlib.rcParams[name] for name in names}
plot.image_sheet(np.zeros((9, 28, 28), np.uint8)).savefig(io.BytesIO())
assert {name: matplotlib.rcParams[name] for name in names} == before
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


def test_table_gives_mean_and_sd_at_the_last_and_the_best_epoch():
    arm = history(runs=4)
    lines = report.table({"arm": arm}).splitlines()
    assert len({len(line) for line in lines}) == 1
    last = f"{arm.validation.loss[:, -1].mean():.4f} ± {arm.validation.loss[:, -1].std(ddof=1):.4f}"
    assert last in lines[2]
    best = arm.validation.loss.argmin(axis=1)
    accuracy = arm.validation.accuracy[np.arange(4), best]
    assert f"{accuracy.mean():.4f} ± {accuracy.std(ddof=1):.4f}" in lines[3]
    assert f"best: {best.min() + 1}-{best.max() + 1}" in lines[3]
    for line, epoch in ((lines[2], np.full(4, 4)), (lines[3], best)):
        leaves = (arm.running_loss, arm.train.loss, *arm.validation)
        means = [f"{leaf[np.arange(4), epoch].mean():.4f}" for leaf in leaves]
        assert [cell.split()[0] for cell in line.strip("|").split("|")[2:]] == means


def test_json_holds_every_figure():
    arm = history(runs=2)
    results = json.loads(json.dumps(report.as_json({"arm": arm}, seeds=[0, 1], config=TrainConfig(), rates=[0.0])))
    assert results["arms"]["arm"] == {
        "running_loss": arm.running_loss.tolist(),
        "train": {"loss": arm.train.loss.tolist(), "accuracy": arm.train.accuracy.tolist()},
        "validation": {"loss": arm.validation.loss.tolist(), "accuracy": arm.validation.accuracy.tolist()},
    }
    assert results["config"]["batch_size"] == 64
    assert results["seeds"] == [0, 1]
    assert results["rates"] == [0.0]
    assert results["environment"]["versions"]["jax"] == jax.__version__
    assert results["environment"]["devices"]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("hidden", [256], TypeError),
        ("hidden", (256, 0), ValueError),
        ("hidden", (256.0,), TypeError),
        ("batch_size", 0, ValueError),
        ("batch_size", "64", TypeError),
        ("batch_size", True, TypeError),
        ("learning_rate", 0.0, ValueError),
        ("learning_rate", -1.0, ValueError),
        ("learning_rate", float("nan"), ValueError),
        ("learning_rate", float("inf"), ValueError),
        ("learning_rate", "0.003", TypeError),
        ("train_eval_size", 0, ValueError),
        ("eval_batch_size", -5, ValueError),
    ],
)
def test_config_refuses_bad_fields(field, value, error, unchecked):
    with pytest.raises(error, match=f"{field}.*must"):
        Config(**{field: value})


def test_config_is_a_static_argument():
    assert hash(TrainConfig()) == hash(TrainConfig())
    assert TrainConfig() != TrainConfig(batch_size=128)


def end(epoch, epochs) -> EpochEnd:
    running, loss, train_accuracy, validation_loss, accuracy = map(np.asarray, (0.5, 0.4, 0.8, 0.45, 0.85))
    history = History(running, Metrics(loss, train_accuracy), Metrics(validation_loss, accuracy))
    return EpochEnd(epoch, epochs, TrainConfig(), 50, (0.2,), None, history, lambda: init_state(jax.random.key(0)))


def test_progress_prints_plain_lines_without_a_terminal():
    stream = io.StringIO()
    with Progress(3, file=stream) as progress:
        for epoch in (1, 2, 3):
            progress(end(epoch, 3))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("epoch 3/3, dropout 0.2: training loss 0.4000, validation loss 0.4500, accuracy 0.8500")
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize(
    ("total", "reports", "left"),
    [
        # Each epoch takes a second.
        (6, [(1, 3), (2, 3), (3, 3), (1, 3), (2, 3), (3, 3)], [5, 4, 3, 2, 1, 0]),
        (10, [(1, 3), (2, 3), (3, 3), (6, 7), (7, 7)], [9, 8, 7, 1, 0]),
        (1, [(1, 3), (2, 3), (3, 3)], [0, 0, 0]),
        (4, [(3, 4), (4, 4)], [1, 0]),
        (2, [(1, 1), (1, 1)], [1, 0]),
    ],
)
def test_progress_tells_the_time_left(monkeypatch, total, reports, left):
    seconds = iter(range(100))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(seconds))
    stream = io.StringIO()
    with Progress(total, file=stream) as progress:
        for report in reports:
            progress(end(*report))
    assert [line.rpartition("(")[2] for line in stream.getvalue().splitlines()] == [f"{of} s left)" for of in left]


def test_progress_shows_each_rate_s_mean_over_its_seeds():
    """Without the lanes that have stopped."""
    leaf = np.array([[0.1, 0.2, 0.6], [0.5, np.nan, 0.7], [np.nan] * 3])
    history = History(leaf, Metrics(leaf, leaf), Metrics(leaf + 1, leaf / 2))
    stream = io.StringIO()
    with Progress(1, file=stream) as progress:
        progress(end(1, 1)._replace(dropout_rates=(0.0, 0.2, 0.9), seeds=(0, 1, 2), history=history))
    assert stream.getvalue().startswith(
        "epoch 1/1, dropout 0 | 0.2 | 0.9: training loss 0.3000 | 0.6000 | stopped, "
        "validation loss 1.3000 | 1.6000 | stopped, accuracy 0.1500 | 0.3000 | stopped"
    )


def test_progress_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(1, file=stream) as progress:
        progress(end(1, 1))
    assert "1/1" in stream.getvalue()
    assert "accuracy=0.8500" in stream.getvalue()
    with Progress(6, file=stream) as progress:
        progress(end(5, 6))
    assert "5/6" in stream.getvalue(), "a run that goes on begins where it stopped"


def test_files_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "größe 1" / "file.txt"
    write_atomically(path, "first")
    assert path.read_text() == "first"
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_link_stays_and_its_file_keeps_its_mode(tmp_path):
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("first")
    target.chmod(0o400)
    link.symlink_to(target)
    write_atomically(link, "second")
    assert link.is_symlink()
    assert target.read_text() == "second"
    assert stat.S_IMODE(target.stat().st_mode) == 0o400
    assert [entry.name for entry in target.parent.iterdir()] == ["file"]


def run_example(*flags, example=EXAMPLE.name):
    command = [sys.executable, str(EXAMPLES / example), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_example_compares_both_arms_on_the_real_data(tmp_path):
    places = ("--output", tmp_path / "out", "--log", tmp_path / "log.jsonl")
    result = run_example("--epochs", 2, "--seeds", 2, "--train-size", 5000, *places)
    assert result.returncode == 0, result.stderr
    cells = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines()]
    assert [row[1:2] for row in cells[2:6]] == [["no dropout"], ["no dropout"], ["dropout 0.2"], ["dropout 0.2"]]
    assert cells[2][2] == "last: 2"
    assert result.stderr.count("epoch ") == 2
    assert result.stderr.splitlines()[-1] == f"pictures, report and history are in {tmp_path / 'out'}"
    assert str(tmp_path) not in result.stdout
    assert "dropout raises accuracy" in result.stdout
    assert "weak: 2 seeds" in result.stdout
    names = ["history.json", "losses.png", "prediction.png", "report.json", "report.md", "samples.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in (name for name in names if name.endswith("png")):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "history.json").read_text())
    assert np.shape(results["arms"]["dropout 0.2"]["validation"]["loss"]) == (2, 2)
    assert results["seeds"] == [0, 1]
    assert results["flags"]["train_size"] == 5000
    assert not set(report.PLACES) & results["flags"].keys()
    assert "test" not in results
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["holdout"] for line in logged} == {0.0}
    of_dropout = [line["validation_loss"] for line in logged if line["dropout_rate"] == 0.2 and line["seed"] == 1]
    assert of_dropout == results["arms"]["dropout 0.2"]["validation"]["loss"][1]
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(summary["verdicts"]) == 7
    assert np.shape(summary["arms"]["dropout 0.2"]["late_rise"]) == (2,)
    assert "| dropout raises accuracy" in (tmp_path / "out" / "report.md").read_text()


def test_the_example_compares_with_the_last_rate_that_drops_something(tmp_path):
    flags = ("--epochs", 1, "--seeds", 2, "--train-size", 5000, "--rates", 0.5, 0, "--output", tmp_path)
    result = run_example(*flags)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "history.json").read_text())
    assert list(results["arms"]) == ["dropout 0.5", "no dropout"]
    plain, dropped = (
        np.array(results["arms"][name]["validation"]["accuracy"]) for name in ("no dropout", "dropout 0.5")
    )
    raises = next(line for line in result.stdout.splitlines() if line.startswith("| dropout raises accuracy"))
    assert f"{(dropped - plain)[:, -1].mean():+.4f}" in raises


def test_the_example_touches_the_test_set_once_with_a_hold_out(tmp_path):
    flags = ("--epochs", 1, "--seeds", 1, "--train-size", 2000, "--holdout", 0.2, "--rates", 0.5, "--output", tmp_path)
    result = run_example(*flags)
    assert result.returncode == 0, result.stderr
    assert "epoch chosen on the hold-out" in result.stdout
    results = json.loads((tmp_path / "history.json").read_text())
    # [rates, seeds, loss and accuracy]
    assert np.shape(results["test"]["last epoch"]) == (1, 1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rates", 1.5), "error: dropout_rates must lie in [0, 1), got 1.5"),
        (("--rates", 0.2, 0.2), "none twice"),
        (("--seeds", 0), "--seeds must be at least 1, got 0"),
        (("--epochs", 0), "epochs must be at least 1, got 0"),
        (("--holdout", 1.5), "fraction must lie in (0, 1)"),
        (("--train-size", 70000), "size must lie between 1 and the 60000 examples"),
        (("--data-dir", "/no/such"), "data_dir does not exist: /no/such"),
        (("--epoch", 3), "Perhaps you meant"),
    ],
)
def test_the_example_refuses_bad_flags(tmp_path, call, flags, message):
    result = call(EXAMPLE, *flags, "--output", tmp_path)
    assert result.returncode != 0
    assert message in " ".join((result.stderr + result.stdout).split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_the_complete_epochs(tmp_path):
    # A shell lets what it starts in the background ignore SIGINT, and children inherit that; so it is set here.
    start = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", start, str(EXAMPLE), "--epochs", "100000", "--seeds", "2", "--train-size", "5000"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = 0
    while seen < 3:
        seen += process.stderr.readline().startswith("epoch ")
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "of 100000; run the command again to train all" in errors
    results = json.loads((tmp_path / "history.json").read_text())
    assert np.shape(results["arms"]["no dropout"]["running_loss"])[1] >= 3


def test_reference_curves_are_read(tmp_path):
    curves = report.read_curves(REFERENCE)
    assert sorted(curves) == [0.0, 0.2]
    assert curves[0.2].validation.loss.shape == (3, 30)
    assert curves[0.0].running_loss[0, 0] == 0.516
    assert (curves[0.0].validation.loss[0, 0], curves[0.0].validation.accuracy[0, 0]) == (0.434, 0.845)
    assert np.isnan(curves[0.0].train.loss).all()
    path = tmp_path / "curves.csv"
    path.write_text("run,epoch\na,1\n")
    with pytest.raises(ValueError, match="lacks the columns dropout_rate, running_train_loss"):
        report.read_curves(path)
    path.write_text(REFERENCE.read_text().rsplit("\n", 2)[0])
    with pytest.raises(ValueError, match=r"curves\.csv: a run must have each epoch from 1 to 30 once; run .* 28, 29$"):
        report.read_curves(path)


def test_reference_curves_are_in_the_order_of_their_epochs(tmp_path):
    path = tmp_path / "curves.csv"
    rows = "".join(f"a,0.2,{epoch},{epoch / 100},0.5,0.8\n" for epoch in range(10, 0, -1))
    path.write_text("run,dropout_rate,epoch,running_train_loss,test_loss,test_accuracy\n" + rows)
    assert report.read_curves(path)[0.2].running_loss.tolist() == [[epoch / 100 for epoch in range(1, 11)]]


def test_the_reference_lies_under_the_curves():
    arms = {"no dropout": history()}
    plain = plot.losses(arms).axes[0]
    under = plot.losses(arms, reference={"no dropout": report.read_curves(REFERENCE)[0.0]}).axes[0]
    assert len(under.lines) == len(plain.lines) + 6
    told = [text.get_text() for text in under.get_legend().get_texts()]
    assert told[:2] == ["PyTorch reference runs, while training", "PyTorch reference runs, validation"]


def test_the_study_draws_a_line_a_size_and_marks_the_best_rate():
    rng = np.random.default_rng(0)
    leaves = rng.uniform(0.2, 0.5, (5, 2, 3, 4, 6))
    summary = evidence.summarise(History(leaves[0], Metrics(leaves[1], leaves[2]), Metrics(leaves[3], leaves[4])))
    figure = plot.study(summary, dropout_rates=[0.0, 0.2, 0.5], sizes=[1_000, 5_000])
    for axes, values in zip(figure.axes, (summary.final_loss, summary.fair_gap, summary.final_accuracy), strict=False):
        for line, expected in zip(axes.lines, values, strict=True):
            np.testing.assert_allclose(line.get_ydata(), expected.mean(axis=1))
    stars = [tuple(map(int, text.get_position())) for text in figure.axes[3].texts if text.get_text() == "★"]
    assert stars == [(int(loss.argmin()), i) for i, loss in enumerate(summary.final_loss.mean(axis=2))]
    pixels(figure)
    with pytest.raises(ValueError, match=r"\[sizes, rates, seeds\] = \[2, 2, 'any'\], got \[2, 3, 4\]"):
        plot.study(summary, dropout_rates=[0.0, 0.2], sizes=[1_000, 5_000])


def test_the_study_draws_rates_and_sizes_in_ascending_order():
    rng = np.random.default_rng(0)
    leaves = rng.uniform(0.2, 0.5, (5, 2, 3, 4, 6))
    whole = History(leaves[0], Metrics(leaves[1], leaves[2]), Metrics(leaves[3], leaves[4]))
    mixed = jax.tree.map(lambda leaf: leaf[::-1][:, [2, 0, 1]], whole)
    expected = plot.study(evidence.summarise(whole), dropout_rates=[0.0, 0.2, 0.5], sizes=[1_000, 5_000])
    figure = plot.study(evidence.summarise(mixed), dropout_rates=[0.5, 0.0, 0.2], sizes=[5_000, 1_000])
    np.testing.assert_array_equal(pixels(figure), pixels(expected))


def test_the_sweep_example_chooses_on_a_hold_out_and_tests_once(tmp_path, call):
    flags = ("--rates", 0, 0.5, "--sizes", 500, 1000, "--seeds", 2, "--epochs", 1, "--output", tmp_path)
    result = run_example(*flags, example="dropout_sweep.py")
    assert result.returncode == 0, result.stderr
    assert "2 seeds, which are few" in result.stdout
    assert str(tmp_path) not in result.stdout
    assert result.stderr.splitlines()[-1] == f"study.png, report.md and history.json are in {tmp_path}"
    results = json.loads((tmp_path / "history.json").read_text())
    assert np.shape(results["arms"]["500 images"]["validation"]["loss"]) == (2, 2, 1)
    assert [row["size"] for row in results["test"]] == [500, 1000]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    refused = call(EXAMPLES / "dropout_sweep.py", "--rates", 0.5, "--output", tmp_path)
    assert refused.returncode == 1
    assert "error: --rates must have 0 among them" in refused.stderr


def test_curves_from_a_spreadsheet_are_read(tmp_path):
    """Which puts a byte order mark in front."""
    path = tmp_path / "curves.csv"
    columns = "run,dropout_rate,epoch,running_train_loss,test_loss,test_accuracy"
    path.write_text(columns + "\na,0.2,1,0.6,0.5,0.8\n", encoding="utf-8-sig")
    assert report.read_curves(path)[0.2].running_loss.tolist() == [[0.6]]
