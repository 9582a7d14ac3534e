"""What examples and benchmarks share: flags, a log on standard error, results, errors in one line, exit statuses."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import tyro

from fashion_jax import devices, files, plot, report
from fashion_jax.types import History

INTERRUPTED = 130
# The number of tasks that the launcher has started together: SLURM's srun, Open MPI's mpirun.
LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
USERS_ERRORS = (ValueError, OSError, MemoryError, FloatingPointError, ImportError)
logger: logging.Logger = logging.getLogger(__name__)


def run_script(
    main: Callable[[Any], int | None], flags_type: type, description: str | None, **options: Any
) -> NoReturn:
    """Parse flags, run `main(flags)`, and exit: with its status, 1 after an error, 130 after Ctrl-C.

    With `flags.distributed` the tasks of a job train together. Without it only one task may write to `flags.output`.
    """
    flags = tyro.cli(flags_type, description=description, **options)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fashion_jax").setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        if output := getattr(flags, "output", None):
            _join_tasks(flags)
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
        status = main(flags)
        sys.stdout.flush()
    except KeyboardInterrupt:
        directory = getattr(flags, "checkpoint", None) or "a directory, if it names one with --checkpoint"
        logger.warning("interrupted; the same command resumes from %s", directory)
        status = INTERRUPTED
    except BrokenPipeError:  # Nobody reads the output, and Python would fail to flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if isinstance(error, USERS_ERRORS):
            logger.error("error: %s", str(error) or repr(error))
        elif "JAX_PLATFORMS" in os.environ and not _has_devices():
            logger.error("error: JAX finds no device for JAX_PLATFORMS=%s; unset it", os.environ["JAX_PLATFORMS"])
        else:
            raise
        status = 1
    sys.exit(status)


def _join_tasks(flags: Any) -> None:
    tasks = max(int(os.environ.get(name, "1")) for name in LAUNCHED)
    if getattr(flags, "distributed", False):
        with flag("--distributed"):
            devices.join_machines()
    elif tasks > 1:
        advice = "pass --distributed, or start one task" if hasattr(flags, "distributed") else "start one task"
        raise ValueError(f"{tasks} tasks of this job would write to {flags.output}; {advice}")


def _has_devices() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except Exception:  # JAX raises RuntimeError, or AssertionError if the plugin is not installed.
        return False


@contextlib.contextmanager
def flag(name: str) -> Iterator[None]:
    """Put a flag's name in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def exit_if_interrupted(history: History, epochs: int) -> None:
    """Exit if Ctrl-C ended a run early; the run has told how to resume."""
    if history.running_loss.shape[-1] < epochs:
        sys.exit(INTERRUPTED)


def publish(flags: Any, tables: Mapping[str, Any], figures: Mapping[str, Any], **records: Mapping[str, Any]) -> None:
    """Write each record as JSON, the tables as report.md and the figures as PNG to `flags.output`; print the tables.

    Of several processes the first one does so.
    """
    import jax

    if jax.process_index() > 0:
        return
    for name, record in records.items():
        about = {"environment": report.environment(), "flags": flags}
        files.write(flags.output / f"{name}.json", report.as_json({**about, **record}))
    texts = [table if isinstance(table, str) else report.markdown(table) for table in tables.values()]
    text = "\n\n".join(f"{heading}\n\n{table}" for heading, table in zip(tables, texts, strict=True))
    files.write(flags.output / "report.md", text + "\n")
    for name, figure in figures.items():
        plot.save(figure, flags.output / f"{name}.png")
    logger.info("the results are in %s", flags.output)
    print(text)
