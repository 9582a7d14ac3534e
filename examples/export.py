"""Write a trained network for PyTorch, safetensors, StableHLO and ONNX, and check each file on the test set.

Prints how far the probabilities from each file, read back and run, are from ours on the 10,000 test images.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
import tyro

from fashion_jax import TrainConfig, files, interop, load, predict
from fashion_jax.script import publish, run_script


@dataclasses.dataclass(frozen=True)
class Flags:
    # The network, as `examples/classify.py` saves it; or PyTorch weights, if the name ends in .pth or .pt.
    model: tyro.conf.Positional[Path] = Path("runs/classify/network.safetensors")
    data_dir: Path | None = None  # Directory with the data set.
    output: Path = Path("runs/export")  # Directory to write to.


def main(flags: Flags) -> None:
    if not flags.model.exists():
        raise FileNotFoundError(f"there is no network {flags.model}; examples/classify.py PICTURE trains one")
    if flags.model.suffix in (".pth", ".pt"):
        params = interop.load_torch(flags.model)
        config = TrainConfig(model=interop.model_for(params))
    else:
        params, config, _ = interop.load_safetensors(flags.model)
    images, labels = load(data_dir=flags.data_dir).test
    pth, safetensors, stablehlo, onnx = (
        flags.output / f"network.{suffix}" for suffix in ("pth", "safetensors", "stablehlo", "onnx")
    )

    def by_torch() -> np.ndarray:
        import torch

        buffer = io.BytesIO()
        torch.save(interop.to_torch(params), buffer)
        files.write(pth, buffer.getvalue())
        tensors = torch.load(pth, weights_only=True)
        x = ((torch.tensor(images).float() / 255 - 0.5) / 0.5).flatten(1)
        for i in range(1, len(params) + 1):
            x = torch.nn.functional.linear(x, tensors[f"fc{i}.weight"], tensors[f"fc{i}.bias"])
            x = x.relu() if i < len(params) else x.softmax(dim=1)
        return x.numpy()

    def from_torch() -> np.ndarray:
        return predict(interop.load_torch(pth), images, config=config)

    def by_safetensors() -> np.ndarray:
        interop.save_safetensors(safetensors, params, config=config)
        network = interop.load_safetensors(safetensors)
        return predict(network.params, images, config=network.config)

    def by_stablehlo() -> np.ndarray:
        interop.export(stablehlo, params, config=config)
        return np.asarray(interop.load_exported(stablehlo)(images))

    def by_onnx() -> np.ndarray:
        import onnxruntime

        interop.export_onnx(onnx, params, config=config)
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"images": np.asarray(images)})[0])

    ours = predict(params, images, config=config)
    routes = {
        "predict": lambda: ours,
        "our weights in PyTorch": by_torch,
        "PyTorch's file, read back": from_torch,
        "safetensors, read back": by_safetensors,
        "StableHLO, run by jax.export": by_stablehlo,
        "ONNX, run by onnxruntime": by_onnx,
    }
    rows = [["route", "largest difference of a probability", "accuracy"]]
    for name, run in routes.items():
        try:
            theirs = run()
            rows.append([name, f"{np.abs(theirs - ours).max():.1e}", f"{(theirs.argmax(axis=1) == labels).mean():.4f}"])
        except ImportError as error:
            rows.append([name, f"not run: {error}", "-"])
    publish(flags, {f"{flags.model.name}, read and run elsewhere:": rows}, {}, report={"routes": rows})


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
