"""A browser for a file's tests of the page, and a server that has something to show."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from chromium import chromium
from serving import Running


@pytest.fixture(scope="module")  # no longer: while it is there, no test of its process can run an event loop
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def stocked(server: Running, adapters: list[Path]) -> Running:
    """Two adapters, of which the second has two versions."""
    for name, folder in (("one", adapters[3]), ("two", adapters[4]), ("two", adapters[5])):
        assert server.put(name, folder).status_code in (200, 201)
    return server
