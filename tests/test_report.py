"""Records, tables and pages: every figure as JSON, Markdown that stays a table, HTML that takes names literally."""

import dataclasses
import functools
import json
import os
import platform
import re
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import history

from fashion_jax import page, plot, report
from fashion_jax.config import TrainConfig
from fashion_jax.statistics import compare

REFERENCE = Path(__file__).parent / "reference" / "pytorch_curves.csv"
CLAIMS = ['dropout <b>helps</b> & "pays"', "*a*|b"]
COMMAND = "python examples/compare_overfit.py --output 'my runs/<i>'"
COLUMNS = "run,dropout_rate,epoch,running_train_loss,test_loss,test_accuracy\n"


def test_table_has_mean_and_std_of_the_final_the_last_and_the_best_epochs():
    arm = history(4, 6)
    lines = report.table({"arm": arm}).splitlines()
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["training loss (running)", "training loss (eval mode)", "validation loss", "accuracy"]
    assert heading == ["arm", "epoch", *names]
    best = arm.validation.loss.argmin(axis=1)
    epochs = {"final: 2-6": None, "last: 6": [5] * 4, f"best: {best.min() + 1}-{best.max() + 1}": best}
    for row, (name, epoch) in zip(rows, epochs.items(), strict=True):
        curves = (arm.running_loss, arm.train.loss, *arm.validation)
        leaves = [leaf[:, 1:].mean(axis=1) if epoch is None else leaf[np.arange(4), epoch] for leaf in curves]
        assert row == ["arm", name, *(f"{leaf.mean():.4f} ± {leaf.std(ddof=1):.4f}" for leaf in leaves)]


def test_table_names_the_arm_that_is_wrong(unchecked):
    wrong = history(3, 5)
    wrong.validation.loss[1:, 4] = np.nan
    with pytest.raises(ValueError, match=r"arms\['b'\] holds numbers that are not finite, in runs \[\[1\], \[2\]\]"):
        report.table({"a": history(3, 5), "b": wrong})
    with pytest.raises(ValueError, match=r"arms\['b'\] must have leaves \[seeds, epochs\]"):
        report.table({"b": history(5)})


def test_json_of_a_config_and_of_flags_is_the_same_in_each_process():
    config = TrainConfig(optimizer=functools.partial(optax.adamw, b1=0.8), augment=lambda key, images: images)
    flags = dataclasses.make_dataclass("Flags", ["epochs", "train_size", *report.PLACES])
    text = report.as_json({"config": config, "flags": flags(3, None, *report.PLACES), "curves": {0.2: jnp.ones(2)}})
    found = json.loads(text)
    assert found["config"].keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    config = found["config"]
    assert (config["batch_size"], config["optimizer"]) == (64, "functools.partial(<function adamw>, b1=0.8)")
    assert "hidden = (256, 128, 64)" in config["model"]
    assert (found["flags"], found["curves"]) == ({"epochs": 3, "train_size": None}, {"0.2": [1, 1]})
    assert "0x" not in text


def test_environment_names_device_processor_and_versions(monkeypatch):
    about = report.environment()
    assert (about["versions"]["jax"], about["devices"]) == (jax.__version__, [one.device_kind for one in jax.devices()])
    assert json.loads(report.as_json(about)) == about
    # As on macOS and Windows.
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    about = report.environment()
    assert (about["processor"], about["threads"]) == ("arm", os.cpu_count())


def test_curves_are_read_in_any_order_and_from_spreadsheets(tmp_path):
    curves, (heading, *rows) = report.read_curves(REFERENCE), REFERENCE.read_text().splitlines()
    assert [(rate, arm.validation.loss.shape) for rate, arm in curves.items()] == [(0.0, (3, 30)), (0.2, (3, 30))]
    assert [curve[0, 0] for curve in (curves[0.0].running_loss, *curves[0.0].validation[:2])] == [0.516, 0.434, 0.845]
    assert np.isnan(curves[0.0].train.loss).all()
    (tmp_path / "curves.csv").write_text("\n".join([heading, *reversed(rows), "", ""]), encoding="utf-8-sig")
    jax.tree.map(np.testing.assert_array_equal, report.read_curves(tmp_path / "curves.csv"), curves)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run,epoch\na,1\n", "must have the columns run, dropout_rate, epoch, running_train_loss"),
        (COLUMNS + "a,0.2,1,x,0.5,0.9\n", "could not convert string to float: 'x'"),
        (COLUMNS + "a,0.2,1,0.5,0.5,0.9\na,0.2,2,0.5\n", "argument 2 is shorter"),
        ("\udcff", "UnicodeDecodeError"),
        (COLUMNS + 2 * "a,0.2,1,0.5,0.5,0.9\n", "each of the 1 runs at rate 0.2 must have epochs 1 to 2, once"),
        (REFERENCE.read_text().rsplit("\n", 2)[0], "each of the 3 runs at rate 0.2 must have epochs 1 to 30, once"),
    ],
)
def test_damaged_curves_are_named(tmp_path, content, message):
    path = tmp_path / "curves.csv"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        report.read_curves(path)


def test_a_page_loads_nothing_and_says_everything_literally():
    accuracy = np.linspace(0.9, 0.93, 8)
    verdicts = [compare(claim, accuracy, accuracy - 0.1, quantity="accuracy") for claim in CLAIMS]
    tables = {"So?": "1 < 2", "A:": report.markdown([("x", "y"), (1, "<td>\n|")]), "B:": report.verdicts(verdicts)}
    figures = {"curve": plot.intervals({"accuracy": {"a": verdicts[0].interval}}), "claims_2": plot.claims(verdicts)}
    text = page.html("Does <it> help?", tables, figures, about={"command": COMMAND, "flags": {"rates": (0.0, 0.2)}})
    assert not any(word in text for word in ("http://", "https://", "@import", "url(", "<script", "<link", "<iframe"))
    # As XML, in which every tag has to be closed.
    root = ElementTree.fromstring(re.sub("<((?:meta|img) [^>]*)>", r"<\1/>", text))
    texts = {tag: [element.text for element in root.iter(tag)] for tag in {element.tag for element in root.iter()}}
    images = [image.attrib for image in root.iter("img")]
    assert [image["alt"].partition(":")[0] for image in images] == ["claims_2", "curve"]
    assert all(image["src"].startswith("data:image/png;base64,iVBORw0KGgo") for image in images)
    assert texts["title"] == texts["h1"] == ["Does <it> help?"]
    assert (texts["li"], texts["strong"]) == ([f"{claim}: " for claim in CLAIMS], ["supported"] * 2)
    assert texts["th"] == ["x", "y", "claim", "answer", "measured (mean, 95% interval)"]
    rows = [(claim, "supported", "accuracy: +0.1000 [+0.1000, +0.1000]") for claim in CLAIMS]
    assert texts["td"] == ["1", "<td> |", *sum(rows, ())]
    assert (texts["p"], texts["dt"], texts["code"]) == (["1 < 2"], ["rates"], [COMMAND, "[0.0, 0.2]"])
