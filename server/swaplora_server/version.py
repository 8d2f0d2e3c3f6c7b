"""Which version of swaplora this is."""

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("swaplora")
    except PackageNotFoundError:  # it runs from its source tree
        return "0+source"


VERSION = _installed()
