"""When does dropout help? Rates against training-set sizes, several seeds, chosen on a hold-out and tested once.

Prints tables and writes study.png, report.md and history.json.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from fashion_jax import TrainConfig, data, evidence, files, plot, report, sweep
from fashion_jax.log import Progress
from fashion_jax.script import INTERRUPTED, run_script
from fashion_jax.train import evaluate

HOLD_OUT = 10_000
PRESETS = {
    "quick": {"rates": (0.0, 0.1, 0.2, 0.35, 0.5, 0.7), "sizes": (1_000, 5_000, 20_000, 50_000), "seeds": 3},
    "full": {
        "rates": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
        "sizes": (1_000, 2_000, 5_000, 10_000, 20_000, 50_000),
        "seeds": 32,
    },
}


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: Literal["quick", "full"] = "quick"
    """quick: 6 rates, 4 sizes, 3 seeds, for two cores. full: 9 rates, 6 sizes, 32 seeds, for an accelerator."""
    rates: tuple[float, ...] | None = None
    """Dropout rates in [0, 1), 0 among them; instead of the preset's."""
    sizes: tuple[int, ...] | None = None
    """Training-set sizes, at most 50,000: 10,000 of the 60,000 images are held out. Instead of the preset's."""
    seeds: int | None = None
    """Number of seeds; instead of the preset's."""
    epochs: int = 30
    """Passes over the training set, whatever its size."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to save to after each epoch. The same command, given again, goes on from there after a run was stopped
    or killed."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set; see `python -m fashion_jax.data --help`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/dropout_sweep")
    """Directory to write into."""


def main(flags: Flags) -> int:
    preset = PRESETS[flags.preset]
    rates = preset["rates"] if flags.rates is None else flags.rates
    sizes = preset["sizes"] if flags.sizes is None else flags.sizes
    seeds = range(preset["seeds"] if flags.seeds is None else flags.seeds)
    if not seeds:
        raise ValueError(f"--seeds must be at least 1, got {flags.seeds}")
    if 0.0 not in rates:
        raise ValueError(f"--rates must have 0 among them, to compare with; got {rates}")
    sweep.use_all_cores()
    config = TrainConfig()
    train, test = data.load(flags.data_dir)
    train, validation = data.hold_out(train, HOLD_OUT / len(train.labels), key=jax.random.key(0))
    files.prepare_directory(flags.output)

    with Progress(flags.epochs * len(sizes)) as progress:
        run = sweep.sweep(
            train,
            validation,
            seeds=seeds,
            dropout_rates=rates,
            train_sizes=sizes,
            config=config,
            epochs=flags.epochs,
            on_epoch=progress,
            checkpoint=flags.checkpoint,
        )
    complete = len(run.history.running_loss)
    if complete < len(sizes):
        how = "go on" if flags.checkpoint else "train all"
        print(f"stopped after {complete} of {len(sizes)} sizes; run the command again to {how}", file=sys.stderr)
    sizes = sizes[:complete]
    summary = evidence.summarise(run.history)

    rows: list[tuple[str, ...]] = [("images", *(f"dropout {rate:g}" for rate in rates))]
    rows += [
        (f"{size:,}", *map(report.mean_and_sd, losses)) for size, losses in zip(sizes, summary.final_loss, strict=True)
    ]
    sections = ["Hold-out loss (nats) after the last epoch:", report.markdown(rows)]

    none = rates.index(0.0)
    chosen = summary.final_loss.mean(axis=-1).argmin(axis=-1)
    rows = [("images", "chosen rate", "test loss, chosen minus none", "test accuracy, chosen minus none")]
    tested = []
    for i, size in enumerate(sizes):
        measured = np.array(
            [
                [
                    evaluate(
                        jax.tree.map(lambda leaf, at=(i, rate, j): leaf[at], run.state.params), test, config=config
                    )
                    for j in range(len(seeds))
                ]
                for rate in (chosen[i], none)
            ],
            np.float64,
        )
        tested.append({"size": size, "chosen rate": rates[chosen[i]], "chosen and none": measured.tolist()})
        differences = [str(evidence.paired(measured[0, :, metric], measured[1, :, metric])) for metric in (0, 1)]
        rows.append((f"{size:,}", f"{rates[chosen[i]]:g}", *(differences if chosen[i] != none else ("-", "-"))))
    sections += [
        "The rate with the lowest mean hold-out loss, and the test set, touched once (mean and 95% interval of the "
        f"differences paired by seed, over {report.number_of_seeds(len(seeds))}).",
        report.markdown(rows),
    ]
    print("\n\n".join(sections))

    arms = {f"{size} images": jax.tree.map(lambda leaf, i=i: leaf[i], run.history) for i, size in enumerate(sizes)}
    results = report.as_json(
        arms, seeds=list(seeds), config=config, dropout_rates=rates, flags=report.recorded_flags(flags), test=tested
    )
    files.write_atomically(flags.output / "history.json", json.dumps(results, indent=1, default=str) + "\n")
    files.write_atomically(flags.output / "report.md", "\n\n".join(sections) + "\n")
    plot.save(plot.study(summary, dropout_rates=rates, sizes=sizes), flags.output / "study.png", dpi=130)
    print(f"study.png, report.md and history.json are in {flags.output}", file=sys.stderr)
    return 0 if complete == len(sizes) else INTERRUPTED


if __name__ == "__main__":
    run_script(main, lambda: tyro.cli(Flags, description=__doc__))
