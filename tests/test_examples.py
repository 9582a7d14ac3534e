"""The examples, run as users run them, on real data: their output, and how they end."""

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fashion_jax import FashionMLP, Splits, TrainConfig, data, devices, evaluate, predict, predict_mc, report, sweep
from fashion_jax.interop import load_safetensors, save_safetensors
from fashion_jax.networks import NormalizedMLP
from fashion_jax.script import _keep_programs, run_script
from fashion_jax.steps import init_state

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if "run_script(" in path.read_text())
# A shell makes what it starts in the background ignore Ctrl-C, and children inherit that.
START = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:]; "
START += "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def start(tmp_path):
    """Start compare_overfit.py; these processes share compiled programs, and none outlives the test."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with contextlib.ExitStack() as stack:

        def start(flags: str, **variables: str) -> subprocess.Popen:
            command = [sys.executable, "-c", START, "examples/compare_overfit.py", *flags.split()]
            options = {"env": os.environ | cache | variables, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **options))
            stack.callback(process.kill)
            return process

        yield start


def cells(text: str) -> list[list[str]]:
    """Return the cells of all tables in a text, headings and rules included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def is_picture(path: Path) -> bool:
    return np.ptp(np.asarray(Image.open(path).convert("L"))) > 200


def test_compare_gives_the_same_report_after_ctrl_c(start, tmp_path):
    flags = "--rates 0.5 0 0.1 --seeds 2 --train-size 1000 --holdout 0.2 --hidden 16 --reference"
    saving = f"{flags} --checkpoint {tmp_path}/saved --log {tmp_path}/log --output {tmp_path}/stopped"
    process = start(f"{saving} --epochs 100000")
    assert any(line.startswith("epoch 1/") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert (process.returncode, "| dropout 0.5 raises accuracy" in out) == (130, True), errors
    done = re.search(rf"^interrupted after epoch (\d+) of 100000; .* resumes from {tmp_path}/saved$", errors, re.M)[1]

    epochs = int(done) + 2
    process = start(f"{saving} --epochs {epochs}")
    out, errors = process.communicate()
    # The epoch that it resumes from, and two more.
    assert (process.returncode, errors.count("\nepoch ")) == (0, 3), errors
    assert f"\nresuming after epoch {done} of {epochs}\n" in errors
    assert "\n--reference has no curves of rate 0.1, 0.5\n" in errors

    process = start(f"{flags} --output {tmp_path}/whole --epochs {epochs}")
    assert any(line.startswith("epoch 1/") for line in process.stderr)
    process.stderr.close()  # Nobody reads its progress anymore.
    assert process.stdout.read() == out
    assert process.wait() in (0, 120)  # Python's own status if it cannot flush standard error.
    names = ("stopped", "whole")
    stopped, files = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in names)
    # The flags are the same but those that name places, which only the command tells.
    assert len({re.sub(b"<code>python .*", b"", part.pop("report.html")) for part in (stopped, files)}) == 1
    assert stopped == files
    assert (sum(name.endswith(".png") for name in files), files["report.md"].decode()) == (6, out)
    history, results = json.loads(files["history.json"]), json.loads(files["report.json"])
    accuracy = {name: np.array(arm["validation"]["accuracy"]) for name, arm in history["arms"].items()}
    assert (list(results["verdicts"]), len(results["test"])) == (["dropout 0.5", "dropout 0.1"], 3 * 2)
    rows = [row for row in cells(out) if row[0].endswith(" raises accuracy")]
    for name, row in zip(results["verdicts"], rows, strict=True):
        assert f"{(accuracy[name] - accuracy['no dropout'])[:, -5:].mean():+.4f}" in row[2]
    assert re.search(r"^\d+ of 14 claims (is|are) undecided; about [\d,]+ .*seeds would decide", out, re.M)


def test_two_tasks_of_a_job_give_the_result_of_one(start, tmp_path, splits):
    """The variables are those of Open MPI's mpirun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1", "JAX_COORDINATOR_PORT": port, "OMPI_COMM_WORLD_SIZE": "2"}
    flags = "--distributed --epochs 1 --seeds 3 --rates 0 0.5 --train-size 300 --hidden 16"
    flags += f" --checkpoint {tmp_path}/saved --log {tmp_path}/log --output {tmp_path}/two"
    tasks = [start(flags, **job, OMPI_COMM_WORLD_RANK=i, OMPI_COMM_WORLD_LOCAL_RANK=i) for i in "01"]
    (out, errors), (other_out, other_errors) = (task.communicate(timeout=300) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], errors + other_errors
    assert (errors.count("epoch 1/1"), other_errors.count("epoch 1/1")) == (1, 0)
    # Gloo, by which CPUs of several processes talk, prints what it connects.
    assert ("| dropout 0.5 raises accuracy" in out, cells(other_out)) == (True, [])
    assert len((tmp_path / "log").read_text().splitlines()) == 6

    few, config = data.subset(splits.train, 300, key=jax.random.key(0)), TrainConfig(FashionMLP((16,)))
    one = sweep(few, splits.test, seeds=range(3), dropout_rate=(0.0, 0.5), config=config, epochs=1)
    alone = {"no dropout": one.at(dropout_rate=0.0).history, "dropout 0.5": one.at(dropout_rate=0.5).history}
    together = json.loads((tmp_path / "two" / "history.json").read_text())["arms"]
    assert together == json.loads(report.as_json(alone))


@pytest.fixture(scope="module")
def few(splits) -> Splits:
    return Splits(*map(functools.partial(data.subset, key=jax.random.key(1)), splits, (1_200, 200)))


@pytest.fixture
def run(monkeypatch, capsys, caplog, few, unchecked):
    """Run an example here, on few images; return its output and its log."""
    load = data.load
    monkeypatch.setattr(data, "load", lambda *_, data_dir=None: load(data_dir=data_dir) if data_dir else few)
    monkeypatch.setattr(devices, "use_all_cores", lambda: None)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("COLUMNS", "200")
    caplog.set_level(logging.INFO, "fashion_jax")

    def run(name, flags, status=0, **constants):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            run_script(module.main, module.Flags, module.__doc__)
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == status, caplog.text
        return printed.out + printed.err, caplog.text

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_flag(run, name):
    text, _ = run(name, "--help")
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    for field in dataclasses.fields(sys.modules[name].Flags):
        meaning = re.search(rf" --{field.name.replace('_', '-')}\b(?!-)(.*?)\(default:", told)
        assert "Positional" in str(field.type) or len(meaning[1].split()) > 3, field.name


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("compare_overfit", "--rates 0.2 1.5", r"--rates must lie in \[0, 1\), got 1\.5"),
        ("compare_overfit", "--rates 0 0", "--rates must hold at least one value, and none twice, got"),
        ("compare_overfit", "--holdout 1.5", r"--holdout must lie in \[0, 1\), got 1\.5"),
        ("compare_overfit", "--learning-rate nan", "--learning-rate must be finite, got nan"),
        ("compare_overfit", "--hidden 16 0", "--hidden must be at least 1, got 0"),
        ("compare_overfit", "--train-size 70000", "--train-size: size must be at most 1200"),
        ("compare_overfit", "--data-dir /no/where", "data_dir.* is not a directory: /no/where"),
        ("compare_overfit", "--output /dev/null/out", "Not a directory: '/dev/null/out'"),
        ("dropout_sweep", "--sizes 60000", "--sizes: size must be at most 1000"),
        ("classify", "", "there is no picture to classify"),
        ("calibration", "--rate 0", "--rate must be above 0, got 0.0"),
        ("classify", "shoe.png --seed -1", "--seed must be at least 0, got -1"),
        ("export", "/no/network.safetensors", "there is no network /no/network.safetensors; examples/classify.py PICT"),
    ],
)
def test_bad_flags_are_named_in_one_line(run, tmp_path, name, flags, message):
    text, log = run(name, f"--output {tmp_path} {flags}", status=1)
    assert re.search(f"^ERROR .* error: .*{message}.*\n\\Z", log, re.M)
    assert (text, log.count("ERROR"), "epoch 1/" in log, list(tmp_path.iterdir())) == ("", 1, False, [])


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_that_do_not_train_together_are_refused(run, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "2")
    for name, advice in ("compare_overfit", "pass --distributed, or start one task"), ("calibration", "start one task"):
        text, log = run(name, f"--output {tmp_path}/out", status=1)
        assert log.endswith(f"error: 2 tasks of this job would write to {tmp_path}/out; {advice}\n")
        assert (text, list(tmp_path.iterdir())) == ("", [])


def test_a_process_without_a_launcher_is_told_to_use_one(start, tmp_path):
    process = start(f"--distributed --output {tmp_path}")
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, out, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: --distributed: start with srun or mpirun, or pass ")


def test_dropout_sweep_chooses_on_a_hold_out(run, tmp_path):
    flags = f"--rates 0 0.9 --sizes 300 --seeds 2 --epochs 1 --output {tmp_path} --checkpoint {tmp_path}/saved"
    text, _ = run("dropout_sweep", flags)
    found = json.loads((tmp_path / "history.json").read_text())
    losses = np.array(found["arms"]["300 images"]["validation"]["loss"])[..., -1]
    chosen = (0, 0.9)[losses.mean(axis=1).argmin()]
    assert found["test"]["300 images"]["chosen rate"] == chosen
    assert (cells(text)[2][1], cells(text)[-1][:2]) == (report.mean_and_std(losses[0]), ["300", f"{chosen:g}"])
    assert is_picture(tmp_path / "study.png")
    assert "epoch 1/1" in text.removeprefix(run("dropout_sweep", flags)[0])  # Nothing was left to train.


def test_best_perceptron_is_chosen_on_a_hold_out(run, few, tmp_path):
    grid = {"dropout_rate": (0.0, 0.95), "weight_decay": (0.1,)}
    flags = f"--epochs 1 --seeds 2 --train-size 600 --output {tmp_path}"
    text, _ = run("best_perceptron", flags, STRUCTURES={"augmented": ((32,), None, grid)})
    tried = [row for row in cells(text) if row[0] == "augmented"]
    assert [row[1:3] for row in tried] == [["0", "0.1"], ["0.95", "0.1"]]
    assert f"Test set: augmented, dropout rate {max(tried, key=lambda row: row[3])[1]}," in text
    networks = [load_safetensors(tmp_path / f"network-{seed}.safetensors") for seed in (0, 1)]
    accuracies = [evaluate(network.params, few.test, config=network.config).accuracy for network in networks]
    found = json.loads((tmp_path / "report.json").read_text())["test"]["accuracy"]
    np.testing.assert_allclose(found, accuracies, atol=1e-6)


def test_rivals_choose_on_a_hold_out(run, tmp_path):
    rivals = dict.fromkeys(("nothing", "early stopping"), (FashionMLP((16,)), {"learning_rate": (1e-6, 0.01)}))
    rivals["batch norm"] = (NormalizedMLP((16,)), {"learning_rate": (0.01,)})
    flags = f"--images 100 --epochs 80 --subsets 2 --output {tmp_path}"
    text, _ = run("when_dropout_helps", flags, RIVALS=rivals, PAIRS=[("early stopping", "nothing")])
    chosen = dict(row for row in cells(text) if len(row) == 2)
    assert chosen["nothing"] == chosen["early stopping"] == "learning_rate 0.01"
    tested = json.loads((tmp_path / "report.json").read_text())["test"]
    plain, stopped, _ = (tested[name] for name in rivals)
    # So few images are soon learned by heart.
    assert np.mean(stopped["loss"]) < np.mean(plain["loss"])
    gain = np.subtract(stopped["accuracy"], plain["accuracy"]).mean()
    assert f": {gain:+.4f} [" in next(row[2] for row in cells(text) if "more accurate than" in row[0])
    assert is_picture(tmp_path / "rivals.png")


def test_calibration_compares_three_ways_to_predict(run, tmp_path):
    """In the program of `dropout_sweep`."""
    flags = f"--epochs 2 --seeds 2 --samples 3 --rate 0.5 --train-size 300 --output {tmp_path}"
    text, _ = run("calibration", flags)
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert list(arms) == ["no dropout", "dropout, weights scaled", "Monte Carlo dropout"]
    for arm, scores in arms.items():
        np.testing.assert_array_equal(np.sum(scores["confusion"], axis=(1, 2)), [200, 200])
        assert [arm, f"{np.mean(scores['accuracy']):.4f}"] in [[row[0], row[1][:6]] for row in cells(text)]
    assert len({str(scores["loss"]) for scores in arms.values()}) == 3
    assert all(is_picture(tmp_path / f"{name}.png") for name in ("reliability", "entropy"))


def test_classify_trains_and_keeps_a_network_and_export_reads_each_format_back(run, few, tmp_path):
    model, good, bad = (tmp_path / name for name in ("kept/network.safetensors", "größe.png", "bad.png"))
    Image.fromarray(few.test.images[0]).save(good)
    bad.write_text("no picture")
    flags = f"{good} --model {model} --output {tmp_path}/out"
    text, log = run("classify", f"{bad} {flags} --epochs 2 --rate 0.3", status=1)
    assert ("epoch 2/2" in text, f"error: {bad} is not a PNG, JPEG or WebP image" in log) == (True, True)
    params, config, _ = load_safetensors(model)
    best = predict(params, few.test.images[:1])[0]
    assert config.model.dropout_rate == 0.3
    assert cells(text)[2][:3] == [str(good), data.CLASS_NAMES[best.argmax()], f"{best.max():.3f}"]
    assert is_picture(tmp_path / "out" / "01-größe.png")

    text, _ = run("classify", f"{flags} --samples 5")
    mc = predict_mc(params, few.test.images[:1], key=jax.random.key(0), samples=5, config=config)
    best = mc.probabilities[0].argmax()
    expected = f"{mc.probabilities[0, best]:.3f} ± {mc.std[0, best]:.3f}", f"{mc.mutual_information[0]:.3f}"
    assert ("epoch" in text, cells(text)[2][2], cells(text)[2][-1]) == (False, *expected)

    for path in (model, tmp_path / "out" / "network.pth"):
        text, _ = run("export", f"{path} --output {tmp_path}/out")
        routes, differences, accuracies = zip(*cells(text)[2:], strict=True)
        assert (len(routes), len({*accuracies}), max(map(float, differences)) < 1e-5) == (6, 1, True)


def test_classify_trains_on_folders_and_remembers_their_names(run, few, tmp_path):
    # Bags and ankle boots: the network that is replaced tells ten classes apart.
    for name, label in {"boot": 9, "bag": 8}.items():
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i, image in enumerate(few.test.images[few.test.labels == label]):
            Image.fromarray(image).save(tmp_path / "mine" / name / f"{i}.png")
    save_safetensors(kept := tmp_path / "kept.safetensors", init_state(jax.random.key(0)).params)
    flags = f"{tmp_path}/mine/bag/0.png {tmp_path}/mine/boot/0.png --model {kept} --output {tmp_path}/out"
    text, _ = run("classify", f"{flags} --train-dir {tmp_path}/mine --epochs 20")
    assert ("epoch 20/20" in text, load_safetensors(kept).class_names) == (True, ("bag", "boot"))
    text, _ = run("classify", flags)
    # The images of the test set are of other classes.
    assert ("epoch" in text, "of test images" in text) == (False, False)
    assert [row[1] for row in cells(text)[2:]] == ["bag", "boot"]


def test_ctrl_c_is_one_line_and_our_own_error_keeps_its_traceback(run, tmp_path):
    flags = f"--output {tmp_path} --checkpoint saved"
    _, log = run("calibration", flags, status=130, use_all_cores=lambda: signal.raise_signal(signal.SIGINT))
    assert log.endswith(" interrupted; the same command resumes from saved\n")
    with pytest.raises(ZeroDivisionError):
        run("calibration", flags, use_all_cores=lambda: 1 / 0)


def test_compiled_programs_are_kept_where_jax_has_a_plugin(monkeypatch, tmp_path):
    """JAX calls its support of GPUs and TPUs plugins."""
    (about := tmp_path / "plugin-1.0.dist-info").mkdir()
    (about / "METADATA").write_text("Name: plugin\nVersion: 1.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before, kept = jax.config.jax_compilation_cache_dir, []
    for plugin, named in ("", ""), ("plugin = plugin", "mine"), ("plugin = plugin", ""):
        (about / "entry_points.txt").write_text(f"[jax_plugins]\n{plugin}")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
        jax.config.update("jax_compilation_cache_dir", None)
        _keep_programs()
        kept.append(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", before)
    assert kept == [None, None, str(tmp_path / "fashion_jax" / "programs")]
