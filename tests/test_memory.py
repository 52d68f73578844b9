"""What `check` measures of a model's memory: in a process that begins as a worker's does."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from pathology import Job
from pathology.errors import ModelError
from pathology.memory import model_peak
from pathology.model import Model
from pathology.testing import mean_colour

NAME = "SEEN_BY_A_MODEL"


def watchful() -> Model:
    """Loads only where the variable is set."""
    if os.environ.get(NAME) != "yes":
        raise ValueError(f"{NAME} is not set")
    return mean_colour(tile_px=32)


def test_a_model_is_measured_with_the_variables_of_a_worker(reference_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "no")
    job = replace(reference_job, model="tests.test_memory:watchful")
    assert model_peak([job], ["numpy"], {NAME: "yes"}) > 2**24
    assert os.environ[NAME] == "no"
    with pytest.raises(ModelError, match="is not set"):
        model_peak([job], ["numpy"], {})
