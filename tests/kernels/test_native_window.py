"""The Python of loads runs beside a step's native code, and not beside its Python."""

import threading
from pathlib import Path

import pytest
import torch

from serving import serving, settings
from swaplora_server.engine.sampling.sampler import Sampler
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.native_window import NativeWindow

GUARD_SECONDS = 60


def returns_in_the_end(window: NativeWindow) -> threading.Event:
    """Set once a thread of its own has waited for `window`."""
    has_returned = threading.Event()

    def wait() -> None:
        window.wait()
        has_returned.set()

    threading.Thread(target=wait, daemon=True).start()
    return has_returned


def test_it_is_closed_in_a_step_but_for_native_code_once_there_is_some() -> None:
    window, seen = NativeWindow(), [NativeWindow().is_open]
    for has_native_code in (True, True, False, False):
        with window.step():
            seen.append(window.is_open)
            if has_native_code:
                with window.native():
                    seen.append(window.is_open)
                seen.append(window.is_open)
        seen.append(window.is_open)
    first, second = [True, True, False, True], [False, True, False, True]
    assert seen == [True, *first, *second, False, True, True, True]


def test_who_waits_goes_on_in_native_code_and_after_a_step_that_failed() -> None:
    window = NativeWindow()
    with window.step(), window.native():
        assert returns_in_the_end(window).wait(GUARD_SECONDS)
    with pytest.raises(ZeroDivisionError), window.step():
        raise ZeroDivisionError
    assert returns_in_the_end(window).wait(GUARD_SECONDS)


def test_native_code_outside_of_a_step_leaves_it_open() -> None:
    window = NativeWindow()
    with window.native():
        pass
    assert window.is_open


def test_a_server_keeps_it_closed_while_it_samples_and_open_when_it_has_nothing_to_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[NativeWindow] = []
    seen: list[bool] = []
    sample, make = Sampler.sample, NativeWindow.__init__

    def made(self: NativeWindow) -> None:
        make(self)
        windows.append(self)

    def sampled(self: Sampler, logits: torch.Tensor, *others: object) -> object:
        if threading.current_thread().name == "engine":
            seen.append(any(not window.is_open for window in windows))
        return sample(self, logits, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(NativeWindow, "__init__", made)
    monkeypatch.setattr(Sampler, "sample", sampled)
    with serving(settings(base, tmp_path)) as server:
        backend = server.service.base.backend
        assert isinstance(backend, CpuBackend)
        assert len(server.token_ids("base", [1, 2, 3], 4)) == 4
        assert returns_in_the_end(backend.window).wait(GUARD_SECONDS)
    assert len(seen) == 4
    assert all(seen)


def test_each_module_of_an_adapter_waits_for_it(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    monkeypatch.setattr(NativeWindow, "wait", lambda _window: waits.append(threading.current_thread().name))
    with serving(settings(base, tmp_path)) as server:
        waits.clear()  # those of the proof
        assert server.put("a", adapters[0]).status_code == 201
        num_surveyed = len(waits)
        server.token_ids("a", [1, 2, 3], 1)
    num_modules = 2 * 7
    assert (num_surveyed, len(waits)) == (num_modules, 2 * num_modules)
    assert {name.rpartition("_")[0] for name in waits} == {"upload", "adapter-load"}
