import jax
import jaxtyping
import pytest

from fashion_jax import Run, data, fit

# Silent broadcasting between ranks hides mistakes: a loss of shape [n, n] still averages to a number.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def splits() -> data.Splits:
    """The real data set; `make data` has put it where `load` finds it."""
    return data.load()


@pytest.fixture(scope="session")
def small(splits) -> data.Batch:
    """A thousand real images; no multiple of the batch size of 64."""
    return data.subset(splits.train, 1_000, key=jax.random.key(7))


@pytest.fixture(scope="session")
def trained(splits) -> Run:
    """A network that has learned something, with dropout 0.2, from 10,000 images."""
    part = data.subset(splits.train, 10_000, key=jax.random.key(7))
    return fit(part, splits.test, key=jax.random.key(0), dropout_rate=0.2, epochs=3)


@pytest.fixture
def unchecked():
    """Switch the run-time check of annotations off, which only the tests have, to see the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
