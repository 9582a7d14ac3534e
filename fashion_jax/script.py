"""Shared by examples and benchmarks: flags, a log on standard error, results, errors in one line, exit statuses."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro

from fashion_jax import _checks, devices, files, page, plot, report, sources
from fashion_jax.types import History

INTERRUPTED = 130
# The number of tasks that the launcher has started together: SLURM's srun, Open MPI's mpirun.
LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
USERS_ERRORS = (ValueError, OSError, MemoryError, FloatingPointError, ImportError)
logger: logging.Logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Flags shared by the training scripts, which add their own."""

    checkpoint: Path | None = None  # Directory to save every epoch to; the same command resumes from there.
    data_dir: Path | None = None  # Directory with the data set.
    output: Path = Path("runs")  # Directory to write to.
    format: Literal["png", "pdf", "svg"] = "png"  # Format of the pictures.
    cache: bool = True  # Keep programs for GPUs and TPUs, once compiled, in ~/.cache/fashion_jax/programs.


def run_script(
    main: Callable[[Any], int | None], flags_type: type, description: str | None, **options: Any
) -> NoReturn:
    """Parse flags, check them, run `main(flags)`, and exit: with its status, 1 after an error, 130 after Ctrl-C.

    With `flags.distributed` the tasks of a job train together. Without it only one task may write to `flags.output`.
    """
    flags = tyro.cli(flags_type, description=description, **options)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fashion_jax").setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        _check(flags)
        if output := getattr(flags, "output", None):
            _join_tasks(flags)
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
        if getattr(flags, "cache", False):
            _keep_programs()
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


def _check(flags: Any) -> None:
    """Raise ValueError, which names the flag, for numbers that make no sense in any script."""
    for field in dataclasses.fields(flags):
        name, value = f"--{field.name.replace('_', '-')}", getattr(flags, field.name)
        if field.name in ("rates", "sizes"):
            _checks.axis(name, value, lambda _, one: one)
        for one in value if isinstance(value, tuple) else (value,):
            if type(one) is int:
                _checks.integer(name, one, 0 if field.default == 0 else 1)
            elif type(one) is float:
                (_checks.rate if field.name in ("rate", "rates", "holdout") else _checks.number)(name, one)


def _join_tasks(flags: Any) -> None:
    tasks = max(int(os.environ.get(name, "1")) for name in LAUNCHED)
    if getattr(flags, "distributed", False):
        with flag("--distributed"):
            devices.join_machines()
    elif tasks > 1:
        advice = "pass --distributed, or start one task" if hasattr(flags, "distributed") else "start one task"
        raise ValueError(f"{tasks} tasks of this job would write to {flags.output}; {advice}")


def _keep_programs() -> None:
    """Let JAX keep compiled programs where it has a plugin for accelerators, unless the user has named a directory.

    On CPUs it would print an error at each start: github.com/jax-ml/jax/issues/38445.
    """
    import jax

    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if accelerators and not named and (cache := sources.cache_dir("programs")):
        jax.config.update("jax_compilation_cache_dir", str(cache))


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
    """Write records as JSON, tables as report.md, figures, and a page to share; print the tables.

    All go to `flags.output`: records as NAME.json, figures as NAME.png, or in `flags.format`, and everything but the
    records as report.html, under the first paragraph of the script's docstring. Of several processes the first does so.

    Args:
        flags: The script's flags; their class is defined in the script.
        tables: Heading of each table, and its rows, the heading row first, or its text.
        figures: Name and matplotlib Figure of each.
        **records: Further records to keep.
    """
    import jax

    if jax.process_index() > 0:
        return
    about = {"environment": report.environment(), "flags": flags}
    for name, record in records.items():
        files.write(flags.output / f"{name}.json", report.as_json({**about, **record}))
    texts = {heading: table if isinstance(table, str) else report.markdown(table) for heading, table in tables.items()}
    text = "\n\n".join(f"{heading}\n\n{table}" for heading, table in texts.items())
    files.write(flags.output / "report.md", text + "\n")
    for name, figure in figures.items():
        plot.save(figure, flags.output / f"{name}.{flags.format}", note=report.machine(about["environment"]))
    about = {"command": shlex.join(["python", *sys.argv]), **about}
    files.write(flags.output / "report.html", page.html(_title(flags), texts, figures, about=about))
    logger.info("the results are in %s", flags.output)
    print(text)


def _title(flags: Any) -> str:
    text = sys.modules[type(flags).__module__].__doc__ or flags.output.name
    return " ".join(text.partition("\n\n")[0].rstrip(".").split())
