"""Two nodes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from clusters import Nodes, ray_nodes


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(2, cpus=3) as found:
        yield found
