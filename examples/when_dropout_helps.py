"""When does dropout help? Dropout against its rivals, three settings each, chosen on a hold-out and tested once."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax

from fashion_jax import FashionMLP, Progress, TrainConfig, evaluate, predict, report, sweep, use_all_cores
from fashion_jax.augment import shift_and_flip
from fashion_jax.calibration import score
from fashion_jax.data import hold_out, load, subset
from fashion_jax.evidence import compare, interval
from fashion_jax.networks import NormalizedMLP
from fashion_jax.plot import intervals
from fashion_jax.script import exit_if_interrupted, logger, publish, run_script

MEASURES = {"accuracy": "accuracy", "loss": "NLL (nats)", "calibration_error": "ECE"}
SPEEDS, RATES = {"learning_rate": (0.0003, 0.001, 0.003)}, {"dropout_rate": (0.1, 0.3, 0.5)}
# Network and settings; early stopping takes the parameters with the lowest hold-out loss.
RIVALS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "nothing": (FashionMLP(), SPEEDS),
    "early stopping": (FashionMLP(), SPEEDS),
    "weight decay": (FashionMLP(), {"weight_decay": (0.1, 0.3, 1.0)}),
    "dropout": (FashionMLP(), RATES),
    "dropout, weight decay": (FashionMLP(), RATES | {"weight_decay": 0.1}),
    "batch norm": (NormalizedMLP(), SPEEDS),
    "batch norm, dropout": (NormalizedMLP(), RATES),
    "layer norm": (NormalizedMLP(norm="layer"), SPEEDS),
    "wider": (FashionMLP((512, 256, 128)), SPEEDS),
    "wider, dropout": (FashionMLP((512, 256, 128)), RATES),
}
CLAIMS = [("dropout", rival) for rival in ("nothing", "early stopping", "weight decay", "batch norm", "layer norm")]
CLAIMS += [(f"{rival}, dropout", rival) for rival in ("batch norm", "wider")]


@dataclasses.dataclass(frozen=True)
class Flags:
    # Sizes of training sets, at most 50,000, and epochs of each.
    sets: tuple[tuple[int, int], ...] = ((1_000, 100), (10_000, 40), (50_000, 20))
    augment: bool = False  # Move and mirror the training images at random.
    seeds: int = 8  # Number of seeds that are tested, from 0; others choose the settings.
    checkpoint: Path | None = None  # Directory to save every epoch to; the same command resumes from there.
    data_dir: Path | None = None  # Directory with the data set.
    output: Path = Path("runs/when_dropout_helps")  # Directory to write to.


def main(flags: Flags) -> None:
    use_all_cores()
    train, test = load(data_dir=flags.data_dir)
    train, validation = hold_out(train, 1 / 6, key=jax.random.key(0))
    augment = functools.partial(shift_and_flip, pixels=1) if flags.augment else None
    panels, tables, tested = {}, {}, {}
    for size, epochs in flags.sets:
        part, title = subset(train, size, key=jax.random.key(0)), f"{size:,} images{', augmented' * flags.augment}"
        schedule = optax.cosine_decay_schedule(1.0, epochs * -(-size // 128))

        def adamw(learning_rate=0.001, weight_decay=0.0, schedule=schedule):
            return optax.adamw(lambda step: learning_rate * schedule(step), weight_decay=weight_decay)

        scores, rows = {}, [["rival", "chosen", *MEASURES.values()]]
        for rival, (model, numbers) in RIVALS.items():
            logger.info("%s, %s", title, rival)
            config = TrainConfig(model, adamw, augment=augment, batch_size=128)
            run = functools.partial(sweep, part, validation, config=config, epochs=epochs, callbacks=[Progress()])
            place = flags.checkpoint and flags.checkpoint / title / rival
            search = run(seeds=(1_000, 1_001), checkpoint=place and place / "search", **numbers)
            exit_if_interrupted(search.history, epochs)
            (name, values), end = next(iter(numbers.items())), "best" if rival == "early stopping" else "state"
            found = evaluate(getattr(search, end), validation, config=config).accuracy.mean(axis=1)
            chosen = {name: values[int(found.argmax())]}
            result = run(seeds=range(flags.seeds), checkpoint=place and place / "chosen", **numbers | chosen)
            exit_if_interrupted(result.history, epochs)
            scores[rival] = score(predict(getattr(result, end), test.images, config=config), test.labels)
            measured = {label: interval(getattr(scores[rival], measure)) for measure, label in MEASURES.items()}
            rows.append([rival, f"{name} {chosen[name]:g}", *(str(of).replace("+", "") for of in measured.values())])
            for label, value in measured.items():
                panels.setdefault(f"{label}, {title}", {})[rival] = value
        pairs = {f"{a}: more accurate than {b}": (scores[a].accuracy, scores[b].accuracy) for a, b in CLAIMS}
        verdicts = [compare(claim, *pair, quantity="first minus second") for claim, pair in pairs.items()]
        tables |= {f"{title}: test set, mean and 95% interval": rows, f"{title}: paired": report.verdicts(verdicts)}
        tested[title] = {rival: {measure: getattr(of, measure) for measure in MEASURES} for rival, of in scores.items()}
    publish(flags, tables, {"rivals": intervals(panels)}, report={"test": tested})


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
