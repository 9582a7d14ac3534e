"""Take a trained network elsewhere: PyTorch, safetensors, StableHLO and ONNX, and check each on the test set.

Writes network.pth, network.safetensors, network.stablehlo, network.onnx and report.md, and prints how far the
probabilities of the 10,000 test images are from ours when each file is read and run again. PyTorch, onnx and
onnxruntime need not be there; what needs them is then left out.
"""

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from fashion_jax import CLASS_NAMES, TrainConfig, data, files, interop, report
from fashion_jax.predict import predict
from fashion_jax.script import run_script


@dataclasses.dataclass(frozen=True)
class Flags:
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NETWORK")] = Path(
        "runs/classify/network.safetensors"
    )
    """The network, as `examples/classify.py` keeps it; or PyTorch weights, if the name ends in .pth or .pt."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/export")
    """Directory to write into."""


def main(flags: Flags) -> int:
    if flags.model.suffix in (".pth", ".pt"):
        params = interop.load_torch(flags.model)
        network = interop.Network(params, TrainConfig(hidden=interop.hidden_units(params)), CLASS_NAMES)
    else:
        network = interop.load_safetensors(flags.model)
    params, config, names, rate = network
    images, labels = data.load(flags.data_dir).test
    ours = predict(params, images, config=config)
    paths = {suffix: flags.output / f"network.{suffix}" for suffix in ("pth", "safetensors", "stablehlo", "onnx")}

    def by_torch() -> np.ndarray:
        import torch

        tensors = interop.to_torch(params)
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        files.write_atomically(paths["pth"], buffer.getvalue())
        tensors = torch.load(paths["pth"], weights_only=True)
        x = ((torch.tensor(images).float() / 255 - 0.5) / 0.5).flatten(1)
        layers = len(params)
        for i in range(1, layers + 1):
            x = torch.nn.functional.linear(x, tensors[f"fc{i}.weight"], tensors[f"fc{i}.bias"])
            x = x.relu() if i < layers else x.softmax(dim=1)
        return x.numpy()

    def from_torch() -> np.ndarray:
        return predict(interop.load_torch(paths["pth"], config=config), images, config=config)

    def by_safetensors() -> np.ndarray:
        interop.save_safetensors(paths["safetensors"], params, config=config, class_names=names, dropout_rate=rate)
        network = interop.load_safetensors(paths["safetensors"])
        return predict(network.params, images, config=network.config)

    def by_stablehlo() -> np.ndarray:
        interop.export(params, config, paths["stablehlo"], class_names=names)
        return interop.load_exported(paths["stablehlo"])(images)

    def by_onnx() -> np.ndarray:
        import onnxruntime

        interop.export_onnx(params, config, paths["onnx"], class_names=names)
        session = onnxruntime.InferenceSession(paths["onnx"], providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"images": np.asarray(images)})[0])

    def accuracy(probabilities: np.ndarray) -> str:
        # The labels are Fashion-MNIST's.
        return f"{(probabilities.argmax(axis=1) == labels).mean():.4f}" if names == CLASS_NAMES else "-"

    routes: dict[str, Callable[[], np.ndarray]] = {
        "our weights in PyTorch": by_torch,
        "PyTorch's file, read back": from_torch,
        "safetensors, read back": by_safetensors,
        "StableHLO, run by jax.export": by_stablehlo,
        "ONNX, run by onnxruntime": by_onnx,
    }
    rows: list[tuple[str, ...]] = [("route", "largest difference of a probability", "accuracy")]
    rows.append(("predict", "-", accuracy(ours)))
    for name, run in routes.items():
        try:
            theirs = run()
        except ImportError as error:
            rows.append((name, f"not run: {error}", "-"))
            continue
        rows.append((name, f"{np.abs(theirs - ours).max():.1e}", accuracy(theirs)))
    table = report.markdown(rows)
    print(table)
    files.write_atomically(flags.output / "report.md", table + "\n")
    print(f"the files are in {flags.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
