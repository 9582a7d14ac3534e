"""What is fixed when a training program is compiled.

A `TrainConfig` is hashable and is passed to the jitted functions as a static argument: one config, one compilation.
What may change from run to run without a new program (the key, the dropout rate, the number of epochs) is an argument
of `fashion_jax.train.fit` instead.
"""

import dataclasses
import math
import numbers


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """The tutorial's network and optimiser, as one immutable value.

    Attributes:
        hidden: Units of each hidden layer, input side first.
        batch_size: Examples in one training step.
        learning_rate: Step size of Adam, constant over the run.
        train_eval_size: Training examples that the evaluation-mode training loss is measured on, the same ones for
            every run; None takes all of them.
        eval_batch_size: Examples in one chunk of an evaluation. It bounds memory; results depend on it by rounding
            only.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range.

    >>> TrainConfig(batch_size=128).batch_size
    128
    >>> TrainConfig(batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0
    """

    hidden: tuple[int, ...] = (256, 128, 64)
    batch_size: int = 64
    learning_rate: float = 0.003
    train_eval_size: int | None = 10_000
    eval_batch_size: int = 2_000

    def __post_init__(self):
        if not isinstance(self.hidden, tuple):
            raise TypeError(f"hidden must be a tuple of ints, got {self.hidden!r}")
        counts = {f"hidden[{i}]": units for i, units in enumerate(self.hidden)}
        counts |= {"batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}
        if self.train_eval_size is not None:
            counts["train_eval_size"] = self.train_eval_size
        for name, count in counts.items():
            if not isinstance(count, numbers.Integral) or isinstance(count, bool):
                raise TypeError(f"{name} must be an int, got {count!r}")
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not isinstance(self.learning_rate, numbers.Real) or isinstance(self.learning_rate, bool):
            raise TypeError(f"learning_rate must be a float, got {self.learning_rate!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
