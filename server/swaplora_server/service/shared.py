"""Waiting on the event loop for what a thread does, and others may be waiting for as well."""

import asyncio
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def result_of(future: Future[T]) -> T:
    """Its result or error. Whoever gives up waiting neither cancels it for the others nor has its error logged."""
    waited = asyncio.wrap_future(future)
    waited.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(waited)


async def ended(future: Future[T]) -> None:
    """Return when it is done, whatever came of it."""
    with suppress(Exception):
        await result_of(future)
