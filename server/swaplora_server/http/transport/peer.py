"""Whose connection the request at hand came over: who takes turns with whom."""

from contextvars import ContextVar

peer: ContextVar[str] = ContextVar("peer", default="")  # an address
