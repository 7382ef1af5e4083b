"""One kill of a kind, early enough to lose work; kills_check.py does fifty at any moment.

A lost node is the business of test_cluster.py.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.kills import KilledNights, Kind, killed_nights


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledNights]:
    with killed_nights(tmp_path_factory.mktemp("kills"), num_rows=160, names=["copies"]) as made:
        yield made


@pytest.mark.parametrize("kind", ["driver", "worker"])
def test_a_night_that_was_killed_is_like_another_once_it_is_done(nights: KilledNights, kind: Kind):
    killed = nights.kill(kind, name="copies", share=0.6, rng=np.random.default_rng(0))
    assert killed.codes[-1] == 0
    # Of a batch whose worker died twice the rows are done in a process that is not counted.
    assert killed.num_redone <= nights.num_due["copies"]
