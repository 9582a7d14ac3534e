"""Make examples/dropout_tutorial.ipynb from the script beside it: run every cell and store what it shows."""

import base64
import io
import os
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageChops

SCRIPT = Path(__file__).parents[1] / "examples" / "dropout_tutorial.py"


def main() -> None:
    """Run the script's cells in a fresh kernel; nothing is written unless all of them succeed."""
    notebook = jupytext.read(SCRIPT)
    # jupytext draws identifiers anew each time, and a diff would tell of changes that there are not.
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number:02}"
        # jupytext's note on the script's empty lines, which no reader needs.
        cell.metadata.pop("lines_to_next_cell", None)
    with tempfile.TemporaryDirectory() as profile:
        # Somebody's own settings must not show in what everybody reads.
        os.environ["IPYTHONDIR"] = os.environ["MPLCONFIGDIR"] = profile
        NotebookClient(
            notebook,
            # With times in it no two notebooks would be the same.
            record_timing=False,
            # How many pieces a cell's text comes in depends on chance.
            coalesce_streams=True,
            resources={"metadata": {"path": profile}},
        ).execute()
    # The kernel adds which Python it was.
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    nbformat.validate(notebook)
    nbformat.write(notebook, SCRIPT.with_suffix(".ipynb"))


def smaller(png: str) -> str:
    """Store the same pixels without channels that say nothing: half of the 900 images' file is saved."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    assert picture.getchannel("A").getextrema() == (255, 255), "matplotlib's figures are opaque"
    picture = picture.convert("RGB")
    red, green, blue = picture.split()
    if not ImageChops.difference(red, green).getbbox() and not ImageChops.difference(red, blue).getbbox():
        picture = red
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


if __name__ == "__main__":
    main()
