"""Does dropout prevent overfitting? A tutorial's experiment on Fashion-MNIST, in functional JAX.

    data.load ──> Splits(train, test) ──> data.hold_out, data.subset
                          │
                          v
    TrainConfig ──> fit(train, validation, key=..., dropout_rate=...)              one run
    (compiled)      sweep(train, validation, seeds=..., dropout_rate=(...), ...)   many, as one program
                          │     each epoch: shuffle, train_step x 938, evaluate on training and validation images
                          │     callbacks report it, checkpoint saves it, and the same call resumes from there
                          v
    Run(state, history, best), Sweep(axes, ...).at(dropout_rate=...) ──> evidence.judge ──> report, plot
                          │
                          └──> inference.predict, predict_mc ──> calibration.score, plot.classification
                               interop.to_torch, save_safetensors, export, export_onnx

To read the experiment itself, go from `train.fit` down to `steps.train_step` and `model.FashionMLP`. The names below
are imported on first use, so importing the package is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashion_jax.callbacks import EarlyStopping as EarlyStopping
    from fashion_jax.callbacks import JsonLines as JsonLines
    from fashion_jax.callbacks import Progress as Progress
    from fashion_jax.checkpoint import Checkpoints as Checkpoints
    from fashion_jax.config import TrainConfig as TrainConfig
    from fashion_jax.data import CLASS_NAMES as CLASS_NAMES
    from fashion_jax.data import DATA_SETS as DATA_SETS
    from fashion_jax.data import hold_out as hold_out
    from fashion_jax.data import load as load
    from fashion_jax.data import subset as subset
    from fashion_jax.devices import use_all_cores as use_all_cores
    from fashion_jax.evidence import judge as judge
    from fashion_jax.images import read_folder as read_folder
    from fashion_jax.images import read_image as read_image
    from fashion_jax.inference import predict as predict
    from fashion_jax.inference import predict_mc as predict_mc
    from fashion_jax.model import Dropout as Dropout
    from fashion_jax.model import FashionMLP as FashionMLP
    from fashion_jax.train import evaluate as evaluate
    from fashion_jax.train import fit as fit
    from fashion_jax.train import sweep as sweep
    from fashion_jax.types import Batch as Batch
    from fashion_jax.types import History as History
    from fashion_jax.types import Metrics as Metrics
    from fashion_jax.types import Run as Run
    from fashion_jax.types import Splits as Splits
    from fashion_jax.types import Sweep as Sweep
    from fashion_jax.types import TrainState as TrainState

__version__ = "0.2.0"

_MODULES = {
    "callbacks": ("EarlyStopping", "JsonLines", "Progress"),
    "checkpoint": ("Checkpoints",),
    "config": ("TrainConfig",),
    "data": ("CLASS_NAMES", "DATA_SETS", "hold_out", "load", "subset"),
    "devices": ("use_all_cores",),
    "evidence": ("judge",),
    "images": ("read_folder", "read_image"),
    "inference": ("predict", "predict_mc"),
    "model": ("Dropout", "FashionMLP"),
    "train": ("evaluate", "fit", "sweep"),
    "types": ("Batch", "History", "Metrics", "Run", "Splits", "Sweep", "TrainState"),
}
__all__ = [name for names in _MODULES.values() for name in names]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
