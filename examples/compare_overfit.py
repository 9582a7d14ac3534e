"""Train with and without dropout, several seeds each, and compare the losses: the tutorial's experiment.

Prints a table and verdicts on the tutorial's claims, and writes losses.png, prediction.png, samples.png, history.json,
report.json and report.md.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from fashion_jax import CLASS_NAMES, TrainConfig, data, evidence, files, plot, report, sweep
from fashion_jax.log import JsonLines, Progress
from fashion_jax.predict import predict
from fashion_jax.script import INTERRUPTED, run_script
from fashion_jax.train import evaluate

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "pytorch_curves.csv"


@dataclasses.dataclass(frozen=True)
class Flags:
    epochs: int = 30
    """Passes over the training set."""
    seeds: int = 4
    """Number of seeds; the runs use 0, 1, 2, ... and each seed trains once at every rate."""
    rates: tuple[float, ...] = (0.0, 0.2)
    """Dropout rates to compare, each in [0, 1). Verdicts need 0 among them, and compare it with the last."""
    train_size: int | None = None
    """Training images to use, the same share of each class; all if left out."""
    holdout: float = 0.0
    """Share of the training images to validate on. 0 validates on the test set after each epoch, as the tutorial's code
    does; otherwise the test set is touched once, at the end."""
    reference: bool = False
    """Lay three PyTorch runs under the curves."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to save to after each epoch. The same command, given again, goes on from there after a run was stopped
    or killed."""
    log: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write every epoch's figures into while training runs, one JSON line a network."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/compare_overfit")
    """Directory to write into."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """On several machines: where process 0 listens. Run the same command on each."""
    processes: int | None = None
    """On several machines: how many processes there are."""
    process: int | None = None
    """On several machines: the number of this process, from 0."""


def main(flags: Flags) -> int:
    if flags.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    sweep.use_all_cores()
    if (flags.coordinator, flags.processes, flags.process) != (None, None, None):
        sweep.join_machines(flags.coordinator, flags.processes, flags.process)
    config = TrainConfig()
    train, test = data.load(flags.data_dir)
    validation = test
    if flags.holdout:
        train, validation = data.hold_out(train, flags.holdout, key=jax.random.key(0))
    if flags.train_size is not None:
        train = data.subset(train, flags.train_size, key=jax.random.key(0))
    writes = jax.process_index() == 0
    if writes:
        files.prepare_directory(flags.output)

    seeds = list(range(flags.seeds))
    takers: list[Progress | JsonLines] = []
    with contextlib.ExitStack() as stack:
        if writes:
            takers.append(stack.enter_context(Progress(flags.epochs)))
        if writes and flags.log:
            takers.append(stack.enter_context(JsonLines(flags.log, holdout=flags.holdout)))
        run = sweep.sweep(
            train,
            validation,
            seeds=seeds,
            dropout_rates=flags.rates,
            config=config,
            epochs=flags.epochs,
            on_epoch=lambda end: [take(end) for take in takers],
            checkpoint=flags.checkpoint,
        )
    if not writes:
        return 0
    complete = run.history.running_loss.shape[-1]
    if complete < flags.epochs:
        how = "go on" if flags.checkpoint else "train all"
        print(f"stopped after epoch {complete} of {flags.epochs}; run the command again to {how}", file=sys.stderr)

    stopped = np.isnan(run.history.running_loss).any(axis=(0, 2))
    if stopped.any():
        # Arms are compared seed by seed.
        print(f"left out, because a loss was not finite: seeds {np.flatnonzero(stopped).tolist()}", file=sys.stderr)
        seeds = np.flatnonzero(~stopped).tolist()
        if not seeds:
            raise FloatingPointError("no seed is left in which every arm has finite losses")
        run = jax.tree.map(lambda leaf: leaf[:, ~stopped], run)

    names = [f"dropout {rate}" if rate else "no dropout" for rate in flags.rates]
    arms = {name: jax.tree.map(lambda leaf, i=i: leaf[i], run.history) for i, name in enumerate(names)}
    sections = [report.table(arms)]
    results = report.as_json(
        arms, seeds=seeds, config=config, dropout_rates=flags.rates, flags=report.recorded_flags(flags)
    )
    verdicts = []
    dropped = [name for name, rate in zip(names, flags.rates, strict=True) if rate]
    if dropped and "no dropout" in arms:
        verdicts = evidence.judge(arms["no dropout"], arms[dropped[-1]])
        sections.append(report.verdicts(verdicts))
    if flags.holdout:
        tested = {"last epoch": run.state.params, "epoch chosen on the hold-out": run.best.params}
        results["test"] = {
            when: [
                [
                    evaluate(jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], params), test, config=config)
                    for j in range(len(seeds))
                ]
                for i in range(len(names))
            ]
            for when, params in tested.items()
        }
        results["test"] = {when: np.array(metrics).tolist() for when, metrics in results["test"].items()}
        rows: list[tuple[str, ...]] = [("arm", "test set at the", "loss", "accuracy")]
        for i, name in enumerate(names):
            for when, metrics in results["test"].items():
                rows.append((name, when, *map(report.mean_and_sd, np.transpose(metrics[i]))))
        sections.append(report.markdown(rows))
    print("\n\n".join(sections))

    params = jax.tree.map(lambda leaf: leaf[-1, 0], run.state.params)
    probabilities = predict(params, test.images[:1], config=config)[0]
    curves = report.read_curves(REFERENCE) if flags.reference else {}
    reference = {name: curves[rate] for name, rate in zip(names, flags.rates, strict=True) if rate in curves}
    figures = {
        "losses": plot.losses(arms, reference=reference),
        "prediction": plot.classification(
            test.images[0], probabilities, class_names=CLASS_NAMES, label=int(test.labels[0])
        ),
        "samples": plot.image_sheet(train.images[:900]),
    }
    # The figures of every epoch first: if the disk is full, they are what cannot be made again quickly.
    summary = {"verdicts": report.verdicts_as_json(verdicts), **results, "arms": report.summaries(arms)}
    for name, content in (("history", results), ("report", summary)):
        files.write_atomically(flags.output / f"{name}.json", json.dumps(content, indent=1, default=str) + "\n")
    files.write_atomically(flags.output / "report.md", "\n\n".join(sections) + "\n")
    for name, figure in figures.items():
        plot.save(figure, flags.output / f"{name}.png", dpi=150)
    print(f"pictures, report and history are in {flags.output}", file=sys.stderr)
    return 0 if complete == flags.epochs else INTERRUPTED


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
