"""Does dropout prevent overfitting? A tutorial's experiment on Fashion-MNIST, in functional JAX.

    data.load ──> Splits(train, test) ──> data.hold_out, data.subset
                          │
                          v
    TrainConfig ──> train.fit(train, validation, key=..., dropout_rate=...)            one run
    (compiled)      sweep.sweep(train, validation, seeds=..., dropout_rates=...)       many, as one program
                          │     checkpoint.Store saves each epoch, and both go on from there
                          │     each epoch: shuffle, train_step x 938 (model.FashionMLP, optimiser),
                          │                 evaluate on training and validation images, dropout off
                          v
                  Run(state, history, best) ──> evidence.judge ──> report.table, report.verdicts, plot.losses
                          │
                          └──> predict.predict, predict.predict_mc ──> calibration.score, plot.classification
                               interop.to_torch, interop.save_safetensors, interop.export, interop.export_onnx

The names below are imported when they are first used, so that importing the package costs next to nothing. The figures
are in `fashion_jax.plot`, progress bars in `fashion_jax.log`, tables in `fashion_jax.report`. `predict` and `sweep`
have the names of their modules, and are imported from there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashion_jax.config import TrainConfig as TrainConfig
    from fashion_jax.data import CLASS_NAMES as CLASS_NAMES
    from fashion_jax.data import Batch as Batch
    from fashion_jax.data import Splits as Splits
    from fashion_jax.data import hold_out as hold_out
    from fashion_jax.data import load as load
    from fashion_jax.data import subset as subset
    from fashion_jax.evidence import judge as judge
    from fashion_jax.model import Dropout as Dropout
    from fashion_jax.model import FashionMLP as FashionMLP
    from fashion_jax.predict import predict_mc as predict_mc
    from fashion_jax.predict import read_image as read_image
    from fashion_jax.sweep import use_all_cores as use_all_cores
    from fashion_jax.train import History as History
    from fashion_jax.train import Metrics as Metrics
    from fashion_jax.train import Run as Run
    from fashion_jax.train import TrainState as TrainState
    from fashion_jax.train import fit as fit

__version__ = "0.1.0"
__all__ = [
    "CLASS_NAMES",
    "Batch",
    "Dropout",
    "FashionMLP",
    "History",
    "Metrics",
    "Run",
    "Splits",
    "TrainConfig",
    "TrainState",
    "fit",
    "hold_out",
    "judge",
    "load",
    "predict_mc",
    "read_image",
    "subset",
    "use_all_cores",
]

_ROOMS = {
    "config": ("TrainConfig",),
    "data": ("CLASS_NAMES", "Batch", "Splits", "hold_out", "load", "subset"),
    "model": ("Dropout", "FashionMLP"),
    "evidence": ("judge",),
    "predict": ("predict_mc", "read_image"),
    "sweep": ("use_all_cores",),
    "train": ("History", "Metrics", "Run", "TrainState", "fit"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
