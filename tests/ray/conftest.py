"""Ray is an extra: these are collected where it is installed, as `make test-ray` does."""

import warnings
from importlib.util import find_spec

collect_ignore_glob: list[str] = []
if find_spec("ray") is None:
    collect_ignore_glob.append("test_*.py")
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own use of pydantic, as it is loaded
        import ray.serve  # noqa: F401
