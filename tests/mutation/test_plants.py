"""Every planted bug of `python -m tests.mutation` still matches the code."""

import pathlib

import pytest

from ..native import ROOT
from .plants import PLANTS


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.bug)
def test_it_can_be_planted(plant, tmp_path):
    file = tmp_path / plant.path
    file.parent.mkdir(parents=True)
    file.write_text((ROOT / plant.path).read_text())
    before = plant.apply(tmp_path)
    assert before == (ROOT / plant.path).read_text() and file.read_text() != before
    if file.suffix == ".py":
        compile(file.read_text(), plant.path, "exec")
    assert all(pathlib.Path(ROOT / word).exists() for word in plant.tests if word.startswith("tests/"))


def test_a_plant_that_no_longer_matches_is_an_error(tmp_path):
    plant = PLANTS[0]
    file = tmp_path / plant.path
    file.parent.mkdir(parents=True)
    file.write_text("nothing like it\n")
    with pytest.raises(ValueError, match="there 0 times"):
        plant.apply(tmp_path)
