"""The page to share: one file that says everything, loads nothing, and takes every name literally."""

from html.parser import HTMLParser

import numpy as np
import pytest

from fashion_jax import page, plot, report
from fashion_jax.statistics import compare

CLAIMS = ['dropout <b>helps</b> & "pays"', "*a*|b"]
COMMAND = "python examples/compare_overfit.py --output 'my runs/<i>'"


class Reader(HTMLParser):
    """Tags with their attributes, and texts with their tag; the tags must balance."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in ("meta", "img"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [(self.open[-1], data)] if data.strip() else []


@pytest.fixture(scope="module")
def text() -> str:
    accuracy = np.linspace(0.9, 0.93, 8)
    verdicts = [compare(claim, accuracy, accuracy - 0.1, quantity="accuracy") for claim in CLAIMS]
    tables = {"So?": "1 < 2", "A:": report.markdown([("x", "y"), (1, "<td>")]), "B:": report.verdicts(verdicts)}
    figures = {"curve": plot.intervals({"accuracy": {"a": verdicts[0].interval}}), "claims_2": plot.claims(verdicts)}
    return page.html("Does <it> help?", tables, figures, about={"command": COMMAND, "flags": {"rates": (0.0, 0.2)}})


def test_a_page_loads_nothing(text):
    assert not any(word in text for word in ("http://", "https://", "@import", "url(", "<script", "<link", "<iframe"))
    images = [attributes for tag, attributes in Reader(text).tags if tag == "img"]
    assert [image["alt"].partition(":")[0] for image in images] == ["claims_2", "curve"]
    assert all(image["src"].startswith("data:image/png;base64,iVBORw0KGgo") for image in images)


def test_a_page_says_everything_literally(text):
    texts = Reader(text).texts
    assert [data for tag, data in texts if tag in ("title", "h1")] == ["Does <it> help?"] * 2
    assert [data for tag, data in texts if tag == "li"] == [f"{claim}: " for claim in CLAIMS]
    cells = [data for tag, data in texts if tag in ("th", "td")]
    rows = [(claim, "supported", "accuracy: +0.1000 [+0.1000, +0.1000]") for claim in CLAIMS]
    assert cells == ["x", "y", "1", "<td>", "claim", "answer", "measured (mean, 95% interval)", *sum(rows, ())]
    assert {("code", COMMAND), ("code", "[0.0, 0.2]"), ("dt", "rates"), ("p", "1 < 2"), ("strong", "supported")} <= set(
        texts
    )
