"""Quantizes by recipes and measures; what is finished is kept in a folder, so that a run can be taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from mq_ao import api
from mq_ao.errors import MqAoError
from mq_ao.files import write_atomically
from mq_ao.measuring import digests
from mq_ao.measuring.digests import Batch
from mq_ao.measuring.measured import Measured
from mq_ao.measuring.metric import Metric
from mq_ao.recipes import Recipe


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        what: for a progress bar.
        recipe: what the model is quantized by.
        calibration: batches as for `mq_ao.quantize`, not of the data that is measured on.
    """

    what: str
    recipe: Recipe
    calibration: Sequence[Batch] = field(repr=False)


def measure(
    model: nn.Module,
    metric: Metric,
    jobs: Sequence[Job],
    *,
    resume: Path | None = None,
    progress: Callable[[int, str | None], object] | None = None,
) -> list[Measured]:
    """Quantizes and measures for every job; the same recipe and calibration data are measured once.

    Args:
        model: float model in eval mode; it is not changed.
        metric: what is measured.
        jobs: what to do.
        resume: folder of finished measurements, one file each, which is made if need be. Those for the same recipe,
            model, data and versions are taken from it, and every new one is added to it at once.
        progress: called with 0 and a job's name before it, and with 1 and None after it.

    Returns:
        One measurement a job, in their order.

    Raises:
        MqAoError: see `mq_ao.quantize`; or `resume` holds a file that is no measurement, or cannot be written.
    """
    advance = progress or (lambda count, what: None)
    fixed = [digests.of_model(model), metric.fingerprint]
    finished: dict[str, Measured] = {}
    found = []
    for job in jobs:
        advance(0, job.what)
        key = digests.digest([*fixed, digests.of_batches(job.calibration), digests.of_recipe(job.recipe)])
        kept = None if resume is None else resume / f"{key}.json"
        if key not in finished and kept is not None and kept.exists():
            finished[key] = _read(kept)
        if key not in finished:
            finished[key] = metric(api.quantize(model, job.calibration, job.recipe))
            if kept is not None:
                write_atomically(kept, json.dumps({"recipe": job.recipe.name, **vars(finished[key])}).encode())
        found.append(finished[key])
        advance(1, None)
    return found


def check_folder(resume: Path) -> None:
    """Checks before long work that measurements can be kept in a folder.

    Raises:
        MqAoError: it is a file, or lies in a folder that does not exist.
    """
    if resume.exists() and not resume.is_dir():
        raise MqAoError(f"{resume} is a file: name a folder to keep finished measurements in.")
    if not resume.parent.is_dir():
        raise MqAoError(f"the folder {resume.parent} does not exist: create it first.")


def _read(path: Path) -> Measured:
    try:
        return Measured.parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, MqAoError) as error:
        raise MqAoError(f"{path} is no measurement ({error}): remove it, or resume in another folder.") from error
