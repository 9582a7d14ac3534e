"""The page to share: one file that says everything, loads nothing, and takes every name literally."""

import re
from xml.etree import ElementTree

import numpy as np

from fashion_jax import page, plot, report
from fashion_jax.statistics import compare

CLAIMS = ['dropout <b>helps</b> & "pays"', "*a*|b"]
COMMAND = "python examples/compare_overfit.py --output 'my runs/<i>'"


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
