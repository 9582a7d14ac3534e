"""What tests of the data's sources share: IDX files by hand, and loading in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

CODE = """
import logging, resource, sys
from pathlib import Path
from fashion_jax import data
logging.basicConfig(format="%(message)s")
logging.getLogger("fashion_jax").setLevel(logging.INFO)
url, source, data_dir, limit, debian = sys.argv[1:]
data.URL, data.DEBIAN_DIR = url, Path(debian)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
splits = data.load(data_dir or None, source=source)
print(splits.train.images.shape, splits.test.labels.dtype)
"""


def idx_bytes(array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def replace(path: Path, content: bytes):
    path.unlink()
    path.write_bytes(content)


def start_load(
    home: Path,
    *,
    url="http://127.0.0.1:9/",
    source="auto",
    data_dir: Path | None = None,
    largest_file=None,
    debian="/no/such",
):
    """Start a process that loads. TFDS warns of its own and of its dependencies' futures while it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "TFDS", "FASHION"))}
    arguments = [url, source, str(data_dir or ""), str(largest_file or ""), str(debian)]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        env=environment | {"HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def run_load(home: Path, **options) -> subprocess.CompletedProcess:
    return finish(start_load(home, **options))
