"""The examples, run as users run them, on real data: their output, and how they end."""

import contextlib
import dataclasses
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

from fashion_jax import FashionMLP, Splits, data, devices, evaluate, predict, predict_mc, report
from fashion_jax.interop import load_safetensors, save_safetensors
from fashion_jax.networks import NormalizedMLP
from fashion_jax.script import run_script
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

        def start(*flags: str, **variables: str) -> subprocess.Popen:
            command = [sys.executable, "-c", START, "examples/compare_overfit.py", *" ".join(flags).split()]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            environment = os.environ | cache | variables
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
            stack.callback(process.kill)
            return process

        yield start


def wait_for(process: subprocess.Popen, epochs: int) -> str:
    """Return the process's standard error up to so many more epochs."""
    text = ""
    for line in process.stderr:
        text += line
        if text.count("\nepoch ") == epochs:
            return text
    raise AssertionError(text)


def cells(text: str) -> list[list[str]]:
    """Return the cells of all tables in a text, headings and rules included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def is_picture(path: Path) -> bool:
    return np.ptp(np.asarray(Image.open(path).convert("L"))) > 200


def test_compare_gives_the_same_report_however_often_it_is_stopped(start, tmp_path):
    flags = "--rates 0.5 0 0.1 --seeds 2 --train-size 1000 --holdout 0.2 --hidden 16 --reference"
    saving = f"{flags} --checkpoint {tmp_path}/saved --log {tmp_path}/log --output {tmp_path}/stopped"
    process = start(saving, "--epochs 100000")
    wait_for(process, 2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert (process.returncode, "| dropout 0.5 raises accuracy" in out) == (130, True), errors
    assert re.search(rf"^interrupted after epoch \d+ of 100000; .* resumes from {tmp_path}/saved$", errors, re.M)

    process = start(saving, "--epochs 100000")
    assert "\nresuming after epoch " in wait_for(process, 2)
    process.kill()
    process.communicate()
    epochs = 2 + max(int(re.sub(r"\D", "", path.stem)) for path in (tmp_path / "saved").glob("epoch-*"))
    process = start(saving, f"--epochs {epochs}")
    out, errors = process.communicate()
    # The epoch that it resumes from, and two more.
    assert (process.returncode, errors.count("\nepoch ")) == (0, 3), errors
    assert "\n--reference has no curves of rate 0.1, 0.5\n" in errors

    process = start(flags, f"--output {tmp_path}/whole --epochs {epochs}")
    wait_for(process, 1)
    process.stderr.close()  # Nobody reads its progress anymore.
    assert process.stdout.read() == out
    assert process.wait() in (0, 120)  # Python's own status if it cannot flush standard error.
    stopped, files = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())} for name in ("stopped", "whole")
    )
    # The flags are the same but those that name places, which only the command tells.
    assert len({re.sub(b"<code>python .*", b"", part.pop("report.html")) for part in (stopped, files)}) == 1
    assert stopped == files
    pictures = [f"{name}.png" for name in ("arms", "claims_0.1", "claims_0.5", "losses", "prediction", "samples")]
    assert list(files) == sorted([*pictures, "history.json", "report.json", "report.md"])
    assert files["report.md"].decode() == out

    history, results = json.loads(files["history.json"]), json.loads(files["report.json"])
    assert history["flags"]["epochs"] == epochs
    accuracy = {name: np.array(arm["validation"]["accuracy"]) for name, arm in history["arms"].items()}
    assert list(accuracy) == ["dropout 0.5", "no dropout", "dropout 0.1"]
    judged, rows = results["verdicts"], [row for row in cells(out) if row[0].endswith(" raises accuracy")]
    assert re.findall(r"^No dropout against (.*):$", out, re.M) == list(judged) == ["dropout 0.5", "dropout 0.1"]
    for name, row in zip(judged, rows, strict=True):
        gain = (accuracy[name] - accuracy["no dropout"])[:, -5:].mean()
        assert (len(judged[name]), f"{gain:+.4f}" in row[2]) == (7, True)
    assert len(results["test"]) == 3 * 2
    assert re.search(r"^\d+ of 14 claims (is|are) undecided; about [\d,]+ .*seeds would decide", out, re.M)


def test_two_tasks_of_a_job_give_the_result_of_one(start, tmp_path):
    """The variables are those of Open MPI's mpirun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        launcher = {
            "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1",
            "JAX_COORDINATOR_PORT": str(probe.getsockname()[1]),
        }
    flags = "--epochs 1 --seeds 3 --rates 0 0.5 --train-size 300 --hidden 16"
    ranks = [{"OMPI_COMM_WORLD_RANK": i, "OMPI_COMM_WORLD_LOCAL_RANK": i, "OMPI_COMM_WORLD_SIZE": "2"} for i in "01"]
    shared = f"{flags} --distributed --checkpoint {tmp_path}/saved --log {tmp_path}/log --output {tmp_path}/two"
    tasks = [start(shared, **launcher, **rank) for rank in ranks]
    (out, errors), (other_out, other_errors) = (task.communicate(timeout=300) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], errors + other_errors
    assert errors.count("epoch 1/1") == 1
    assert "epoch 1/1" not in other_errors
    # Gloo, by which CPUs of several processes talk, prints what it connects.
    assert cells(other_out) == []
    assert len((tmp_path / "log").read_text().splitlines()) == 6

    one = start(flags, f"--output {tmp_path}/one")
    printed = one.communicate(timeout=300)[0]
    assert (one.returncode, printed in out, "| dropout 0.5 raises accuracy" in printed) == (0, True, True)
    together, alone = (json.loads((tmp_path / name / "history.json").read_text())["arms"] for name in ("two", "one"))
    assert together == alone


@pytest.fixture
def run(monkeypatch, capsys, caplog, splits, tmp_path, unchecked):
    """Run an example here, on 1,200 and 300 images; return its exit status, its output, and its log."""
    train = data.subset(splits.train, 1_200, key=jax.random.key(1))
    test = data.subset(splits.test, 300, key=jax.random.key(1))
    monkeypatch.setattr(
        data, "load", lambda *name, load=data.load, **place: load(*name, **place) and Splits(train, test)
    )
    monkeypatch.setattr(devices, "use_all_cores", lambda: None)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("COLUMNS", "200")
    caplog.set_level(logging.INFO, "fashion_jax")

    def run(name, flags, **constants):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            run_script(module.main, module.Flags, module.__doc__)
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err, caplog.text

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_flag(run, name):
    status, text, _ = run(name, "--help")
    assert status == 0
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    for field in dataclasses.fields(sys.modules[name].Flags):
        spelled = "--" + field.name.replace("_", "-")
        meaning = re.search(rf" {spelled}\b(?!-)(.*?)\(default:", told)
        assert "Positional" in str(field.type) or len(meaning[1].split()) > 3, spelled


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("compare_overfit", "--rates 0.2 1.5", r"--rates must lie in \[0, 1\), got 1\.5"),
        ("compare_overfit", "--rates 0 0", "--rates must hold at least one value, and none twice, got"),
        ("compare_overfit", "--holdout 1.5", r"--holdout must lie in \[0, 1\), got 1\.5"),
        ("compare_overfit", "--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("compare_overfit", "--learning-rate nan", "--learning-rate must be finite, got nan"),
        ("compare_overfit", "--hidden 16 0", "--hidden must be at least 1, got 0"),
        ("compare_overfit", "--train-size 70000", "--train-size: size must be at most 1200"),
        ("compare_overfit", "--data-dir /no/where", "data_dir.* is not a directory: /no/where"),
        ("compare_overfit", "--output /dev/null/out", "Not a directory: '/dev/null/out'"),
        ("dropout_sweep", "--sizes 60000", "--sizes: size must be at most 1000"),
        ("dropout_sweep", "--epochs 0", "--epochs must be at least 1, got 0"),
        ("calibration", "--train-size 0", "--train-size must be at least 1, got 0"),
        ("calibration", "--samples 0", "--samples must be at least 1, got 0"),
        ("best_perceptron", "--seeds 0", "--seeds must be at least 1, got 0"),
        ("best_perceptron", "--train-size 2", "--train-size: fraction must leave examples in both parts"),
        ("classify", "", "there is no picture to classify"),
        ("classify", "shoe.png --seed -1", "--seed must be at least 0, got -1"),
        ("export", "/no/network.safetensors", "there is no network /no/network.safetensors; examples/classify.py PICT"),
    ],
)
def test_bad_flags_are_named_in_one_line(run, tmp_path, name, flags, message):
    status, text, log = run(name, f"--output {tmp_path} {flags}")
    assert (status, text) == (1, "")
    (error,) = [line for line in log.splitlines() if "ERROR" in line]
    assert re.search(f"error: .*{message}", error)
    assert "epoch 1/" not in log
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize(
    ("name", "advice"),
    [("compare_overfit", "pass --distributed, or start one task"), ("calibration", "start one task")],
)
def test_tasks_that_do_not_train_together_are_refused(run, monkeypatch, tmp_path, variable, name, advice):
    monkeypatch.setenv(variable, "2")
    status, text, log = run(name, f"--output {tmp_path}/out")
    assert (status, text) == (1, "")
    assert log.endswith(f"error: 2 tasks of this job would write to {tmp_path}/out; {advice}\n")
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_launcher_is_told_to_use_one(start, tmp_path):
    process = start(f"--distributed --output {tmp_path}")
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, out, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: --distributed: start with srun or mpirun, or pass ")


def test_dropout_sweep_chooses_on_a_hold_out(run, tmp_path):
    flags = f"--rates 0 0.9 --sizes 300 --seeds 2 --epochs 1 --output {tmp_path} --checkpoint {tmp_path}/saved"
    status, text, _ = run("dropout_sweep", flags)
    assert status == 0
    found = json.loads((tmp_path / "history.json").read_text())
    losses = np.array(found["arms"]["300 images"]["validation"]["loss"])
    chosen = (0, 0.9)[losses[:, :, -1].mean(axis=1).argmin()]
    assert found["test"]["300 images"]["chosen rate"] == chosen
    assert cells(text)[2][1] == report.mean_and_std(losses[0, :, -1])
    assert cells(text)[-1][:2] == ["300", f"{chosen:g}"]
    assert is_picture(tmp_path / "study.png")
    again = run("dropout_sweep", flags)[1]
    assert "epoch 1/1" in text.removeprefix(again)  # Nothing was left to train.


def test_best_perceptron_is_chosen_on_a_hold_out(run, tmp_path):
    grid = {"dropout_rate": (0.0, 0.95), "weight_decay": (0.1,)}
    flags = f"--epochs 1 --seeds 2 --train-size 600 --output {tmp_path}"
    status, text, _ = run("best_perceptron", flags, STRUCTURES={"augmented": ((32,), None, grid)})
    assert status == 0
    tried = [row for row in cells(text) if row[0] == "augmented"]
    assert [row[1:3] for row in tried] == [["0", "0.1"], ["0.95", "0.1"]]
    assert f"Test set: augmented, dropout rate {max(tried, key=lambda row: row[3])[1]}," in text
    test = data.load().test
    accuracies = []
    for seed in (0, 1):
        network = load_safetensors(tmp_path / f"network-{seed}.safetensors")
        accuracies.append(float(evaluate(network.params, test, config=network.config).accuracy))
    found = json.loads((tmp_path / "report.json").read_text())["test"]["accuracy"]
    np.testing.assert_allclose(found, accuracies, atol=1e-6)


def test_rivals_choose_on_a_hold_out(run, tmp_path):
    networks = {"nothing": FashionMLP((16,)), "early stopping": FashionMLP((16,)), "batch norm": NormalizedMLP((16,))}
    rivals = {name: (network, {"learning_rate": (1e-6, 0.01)}) for name, network in networks.items()}
    claims = [("early stopping", "nothing")]
    flags = f"--images 100 --epochs 80 --subsets 2 --output {tmp_path}"
    status, text, _ = run("when_dropout_helps", flags, RIVALS=rivals, PAIRS=claims)
    assert status == 0
    chosen = {row[0]: row[1] for row in cells(text) if len(row) == 2}
    assert chosen["nothing"] == chosen["early stopping"] == "learning_rate 0.01"
    tested = json.loads((tmp_path / "report.json").read_text())["test"]
    assert list(tested) == list(networks)
    # So few images are soon learned by heart.
    assert np.mean(tested["early stopping"]["loss"]) < np.mean(tested["nothing"]["loss"])
    gain = np.subtract(tested["early stopping"]["accuracy"], tested["nothing"]["accuracy"]).mean()
    assert f": {gain:+.4f} [" in next(row[2] for row in cells(text) if "more accurate than" in row[0])
    assert is_picture(tmp_path / "rivals.png")


def test_calibration_compares_three_ways_to_predict(run, tmp_path):
    flags = f"--epochs 2 --seeds 2 --samples 3 --rate 0.5 --train-size 600 --output {tmp_path}"
    status, text, _ = run("calibration", flags)
    assert status == 0
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert list(arms) == ["no dropout", "dropout, weights scaled", "Monte Carlo dropout"]
    for arm, scores in arms.items():
        np.testing.assert_array_equal(np.sum(scores["confusion"], axis=(1, 2)), [300, 300])
        assert [arm, f"{np.mean(scores['accuracy']):.4f}"] in [[row[0], row[1][:6]] for row in cells(text)]
    assert len({str(scores["loss"]) for scores in arms.values()}) == 3
    assert [row[0] for row in cells(text)].count("rotated by 90°") == 2
    assert is_picture(tmp_path / "reliability.png")
    assert is_picture(tmp_path / "entropy.png")


def test_classify_trains_keeps_and_uses_a_network(run, tmp_path):
    test, model = data.load().test, tmp_path / "kept" / "network.safetensors"
    good, bad = tmp_path / "größe.png", tmp_path / "bad.png"
    Image.fromarray(test.images[0]).save(good)
    bad.write_text("no picture")
    flags = f"{good} --model {model} --output {tmp_path}/out"
    status, text, log = run("classify", f"{bad} {flags} --epochs 2 --rate 0.3")
    assert (status, "epoch 2/2" in text) == (1, True)
    assert f"error: {bad} is not a PNG, JPEG or WebP image" in log
    network = load_safetensors(model)
    best = predict(network.params, test.images[:1])[0]
    assert network.config.model.dropout_rate == 0.3
    assert cells(text)[2][:3] == [str(good), data.CLASS_NAMES[best.argmax()], f"{best.max():.3f}"]

    status, text, _ = run("classify", f"{flags} --samples 5")
    assert (status, "epoch" in text) == (0, False)
    mc = predict_mc(network.params, test.images[:1], key=jax.random.key(0), samples=5, config=network.config)
    best = mc.probabilities[0].argmax()
    assert cells(text)[2][2] == f"{mc.probabilities[0, best]:.3f} ± {mc.std[0, best]:.3f}"
    assert cells(text)[2][-1] == f"{mc.mutual_information[0]:.3f}"
    assert is_picture(tmp_path / "out" / "01-größe.png")


def test_classify_trains_on_folders_and_remembers_their_names(run, tmp_path):
    test, kept = data.load().test, tmp_path / "kept.safetensors"
    # Bags and ankle boots: the network that is replaced tells ten classes apart.
    for name, label in {"boot": 9, "bag": 8}.items():
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i, image in enumerate(test.images[test.labels == label][:20]):
            Image.fromarray(image).save(tmp_path / "mine" / name / f"{i}.png")
    save_safetensors(kept, init_state(jax.random.key(0)).params)
    pictures = " ".join(f"{tmp_path}/mine/{name}/{i}.png" for name in ("bag", "boot") for i in range(5))
    flags = f"{pictures} --model {kept} --output {tmp_path}/out"
    status, text, _ = run("classify", f"{flags} --train-dir {tmp_path}/mine --epochs 20")
    assert (status, "epoch 20/20" in text) == (0, True)
    network = load_safetensors(kept)
    assert (network.class_names, network.config.model.classes) == (("bag", "boot"), 2)

    status, text, _ = run("classify", flags)
    assert (status, "epoch" in text) == (0, False)
    assert [row[1] for row in cells(text)[2:]] == ["bag"] * 5 + ["boot"] * 5
    assert "of test images" not in text  # They are of other classes.
    (tmp_path / "mine" / "boot" / "0.png").write_text("no picture")
    status, text, log = run("classify", f"{tmp_path}/mine/bag/0.png --train-dir {tmp_path}/mine --model {kept}")
    assert (status, f"error: {tmp_path}/mine/boot/0.png is not a PNG" in log) == (1, True)


def test_export_reads_each_format_back(run, tmp_path):
    model = tmp_path / "network.safetensors"
    save_safetensors(model, init_state(jax.random.key(0)).params)
    for path in (model, tmp_path / "out" / "network.pth"):
        status, text, _ = run("export", f"{path} --output {tmp_path}/out")
        rows = cells(text)[2:]
        assert (status, len(rows)) == (0, 6)
        assert all(float(difference) < 1e-5 for _, difference, _ in rows)
        assert len({accuracy for *_, accuracy in rows}) == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("no"), 1, "error: no"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes from saved"),
        (ZeroDivisionError(), None, None),
    ],
)
def test_a_user_s_error_is_one_line_and_ours_keeps_its_traceback(monkeypatch, caplog, error, status, line):
    def main(flags):
        raise error

    monkeypatch.setattr(sys, "argv", ["script"])
    flags = dataclasses.make_dataclass("Flags", [("checkpoint", str, "saved")])
    with pytest.raises(SystemExit if status else ZeroDivisionError) as ended:
        run_script(main, flags, "A script.")
    assert not status or (ended.value.code, caplog.messages) == (status, [line])


@pytest.mark.parametrize(
    ("plugins", "named", "kept"),
    [("", "", ""), ("plugin = plugin", "", "fashion_jax/programs"), ("plugin = plugin", "mine", "mine")],
)
def test_compiled_programs_are_kept_where_jax_has_a_plugin(tmp_path, plugins, named, kept):
    """JAX calls its support of GPUs and TPUs plugins."""
    code = "import jax; from fashion_jax.script import _keep_programs as keep; "
    code += "keep(); print(jax.config.jax_compilation_cache_dir or '')"
    (plugin := tmp_path / "plugin-1.0.dist-info").mkdir()
    (plugin / "METADATA").write_text("Name: plugin\nVersion: 1.0")
    (plugin / "entry_points.txt").write_text(f"[jax_plugins]\n{plugins}")
    places = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": named}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=os.environ | places, check=True, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == (str(tmp_path / kept) if "/" in kept else kept)
