import os

import jax
import jaxtyping
import pytest

from fashion_jax.types import Batch, Run, Splits

# Tests compile for longer than they compute, and a third less without LLVM's optimization. CI tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Loggers report to nobody but the test.
os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

# Silent broadcasting between ranks hides mistakes: a loss of shape [n, n] still averages to a number.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def splits() -> Splits:
    """The real data set; `make data` has put it where `load` finds it."""
    from fashion_jax import data

    return data.load()


@pytest.fixture(scope="session")
def small(splits) -> Batch:
    """A thousand real images; no multiple of the batch size of 64."""
    from fashion_jax import data

    return data.subset(splits.train, 1_000, key=jax.random.key(7))


@pytest.fixture(scope="session")
def data(small, splits) -> tuple[Batch, Batch]:
    """Training data of four steps per epoch, the last one with 8 images, and validation data."""
    return Batch(*(leaf[:200] for leaf in small)), Batch(*(leaf[:300] for leaf in splits.test))


@pytest.fixture(scope="session")
def trained(splits) -> Run:
    """A network that has learned something, with dropout 0.2, from 10,000 images."""
    from fashion_jax import data, train

    part = data.subset(splits.train, 10_000, key=jax.random.key(7))
    return train.fit(part, splits.test, key=jax.random.key(0), dropout_rate=0.2, epochs=3)


@pytest.fixture
def unchecked():
    """Switch off the checks of annotations, which only tests have, to see the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
