"""A fake tree and helpers over it that end with the test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helper_rig import Rig, make_tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**options: object) -> Rig:
        rigs.append(Rig(root, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
