"""A GPU that is too small is said at start, by the name of the setting to change, and not by the first request."""

import ctypes
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AutoModelForCausalLM

from serving import serving, settings
from swaplora_server.base import device_memory
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.decode_graphs import RecordedSteps
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.host_memory import room_bytes
from swaplora_server.kernels.cpu.attention import CpuKV
from swaplora_server.kernels.pick import torch_backend
from swaplora_server.kernels.torch.attention import TorchKV
from swaplora_server.service.adapters import host_tier
from swaplora_server.service.generating import decoder_engine
from swaplora_server.service.generating.decoder_engine import DecoderPlan
from swaplora_server.service.service import Service

CPU, _CUDA = torch.device("cpu"), torch.device("cuda")
KV_BYTES, ADAPTER_BYTES = 1 << 20, 1 << 22


def out_of_memory(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def service(base: Path, tmp_path: Path) -> Service:
    return Service(settings(base, tmp_path, kv_cache_bytes=KV_BYTES, adapter_memory_bytes=ADAPTER_BYTES))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")
def test_on_a_cpu_the_kv_cache_has_all_its_pages_before_anybody_asks(base: Path, tmp_path: Path) -> None:
    """Else they are zeroed in the steps that first write to them, which takes as long as some steps."""
    with serving(settings(base, tmp_path, kv_cache_bytes=8 << 20)) as server:
        kv: Any = server.service.engine._runner._kv  # type: ignore[attr-defined]  # noqa: SLF001
        if not isinstance(kv, CpuKV):
            pytest.skip("native kernels need a compiler")
        caches = [cache for layer in kv._layers.values() for cache in layer]  # noqa: SLF001
        assert sum(cache.nbytes for cache in caches) > 7 << 20
        assert all(map(is_resident, caches))


def is_resident(tensor: Tensor) -> bool:
    """Whether memory has been given to all of its pages."""
    page = mmap.PAGESIZE
    start = tensor.data_ptr() // page * page
    num_pages = -(-(tensor.data_ptr() + tensor.nbytes - start) // page)
    is_there = (ctypes.c_ubyte * num_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(num_pages * page), is_there) == 0
    return all(byte & 1 for byte in is_there)


def test_a_kv_cache_beyond_the_hosts_memory_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "room_bytes", lambda: KV_BYTES - 1)
    refusal = refusal_of(service)
    assert f"takes {KV_BYTES} bytes" in refusal
    assert f"has {KV_BYTES - 1} beside the base: lower --kv-cache-bytes" in refusal


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError()])
def test_a_kv_cache_that_the_system_does_not_give_is_refused(
    error: Exception, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("swaplora_server.engine.runner.Runner.run", fail)
    assert "--kv-cache-bytes" in refusal_of(service)


def test_what_is_left_of_the_hosts_memory(tmp_path: Path) -> None:
    assert room_bytes(tmp_path) is None
    for path, text in {
        "proc/meminfo": "MemTotal:       16 kB\nMemFree:        8 kB",
        "proc/self/status": "Name:\tpython\nVmRSS:\t  9 kB\nRssAnon:\t       3 kB\nRssFile:\t 6 kB",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert room_bytes(tmp_path) == 13 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for limit, left in {"max": 13 * 1024, "8192": 5 * 1024, "1024": 0}.items():
        (group / "memory.max").write_text(limit)
        assert room_bytes(tmp_path) == left


@pytest.mark.parametrize("room", [2**40, 1 << 20])
def test_host_memory_that_cannot_be_pinned_is_used_all_the_same(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fail(num_bytes: int) -> NoReturn:
        asked.append(num_bytes)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_tier, "pinned", fail)
    monkeypatch.setattr(host_tier, "room_bytes", lambda: room)
    with capture_logs() as logs:
        tier = host_tier.open_host_tier(1 << 30)
    assert tier._budget == 1 << 30  # noqa: SLF001
    assert "not pinned" in logs[0]["event"]
    assert len(asked) == (room > 1 << 30), "what would be pinned is taken at once"


def let_be_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda _device: free)


def refusal_of(service: Service) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        service.start(lambda _message: None)
    return str(caught.value)


def test_a_kv_cache_beyond_what_is_free_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    let_be_free(monkeypatch, KV_BYTES - 1)
    refusal = refusal_of(service)
    assert f"--kv-cache-bytes asks for {KV_BYTES} " in refusal
    assert f" {KV_BYTES - 1} free" in refusal


def test_a_kv_cache_that_leaves_no_room_to_compute_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_be_free(monkeypatch, KV_BYTES)
    monkeypatch.setattr("swaplora_server.engine.runner.Runner.run", out_of_memory)
    assert "--kv-cache-bytes" in refusal_of(service)


def test_a_base_beyond_the_gpus_memory_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", out_of_memory)
    assert "--quantization" in refusal_of(service)


def test_the_kv_cache_and_the_longest_step_have_their_memory_before_the_first_request(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Batch]
) -> None:
    let_be_free(monkeypatch, 1 << 40)
    made: list[Tensor] = []
    allocate = TorchKV._allocate  # noqa: SLF001 - when memory is taken shows nowhere else

    def noted(self: TorchKV, like: Tensor) -> Tensor:
        made.append(allocate(self, like))
        return made[-1]

    monkeypatch.setattr(TorchKV, "_allocate", noted)
    monkeypatch.setattr("swaplora_server.base.loading.pick_backend", lambda device, *_: torch_backend(device))
    with serving(settings(base, tmp_path, max_batch_tokens=40, max_num_seqs=5)):
        assert len(made) == 4 * 2 * 2, "keys and values of both layers, for three runs of the proof and the engine"
        [batch] = steps
        assert [rows.num_rows for rows in batch.rows] == [36, 1, 1, 1, 1]


@pytest.mark.parametrize(("missing", "is_warned"), [(0, False), (1, True)])
def test_adapters_that_will_not_fit_beside_it_are_warned_of(
    missing: int, is_warned: bool, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_be_free(monkeypatch, KV_BYTES + ADAPTER_BYTES - missing)
    with capture_logs() as log:
        service.start(lambda _message: None)
        service.stop()
    assert any("--adapter-memory-bytes" in entry["event"] for entry in log) == is_warned


def test_host_memory_for_adapters_is_refused_where_there_is_no_other(base: Path, tmp_path: Path) -> None:
    refusal = refusal_of(Service(settings(base, tmp_path, host_adapter_bytes=1 << 20)))
    assert "--host-adapter-bytes" in refusal
    with serving(settings(base, tmp_path / "none", host_adapter_bytes=0)) as server:
        assert server.client.get("/health/ready").status_code == 200


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, free: int, total: int, step: int) -> list[int]:
    """Have the numbers of a GPU; returns the tokens of each step that was run to be measured."""
    measured: list[int] = []

    def peak(run_step: Callable[[], None], _device: torch.device) -> int:
        run_step()
        measured.append(1)
        return step

    let_be_free(monkeypatch, free)
    monkeypatch.setattr(device_memory, "total_bytes", lambda _device: total)
    monkeypatch.setattr(device_memory, "peak_bytes", peak)
    return measured


def test_a_kv_cache_takes_what_is_left_of_a_gpus_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = on_a_gpu(monkeypatch, free=900, total=1000, step=50)
    assert device_memory.left_for_kv(lambda: None, torch.device("cuda"), 0.9, 200, 30) == 900 - 100 - 200 - 50 - 30
    assert ran == [1]


@pytest.mark.parametrize(("free", "adapters", "step"), [(357, 200, 50), (340, 200, 50), (900, 800, 0)])
def test_a_gpu_with_nothing_left_for_a_kv_cache_is_said_so(
    free: int, adapters: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, free, 1000, step)
    with pytest.raises(
        UnsupportedModelError, match=f"{free} bytes free .* {adapters} are for adapters, {step} for a step, 7 for"
    ):
        device_memory.left_for_kv(lambda: None, torch.device("cuda"), 0.9, adapters, 7)


def test_a_step_that_does_not_fit_is_said_by_the_setting_that_makes_it_large(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 900, 1000, 0)
    with pytest.raises(UnsupportedModelError, match="--max-batch-tokens"):
        device_memory.left_for_kv(out_of_memory, torch.device("cuda"), 0.9, 0, 0)


def test_recorded_steps_are_given_the_memory_of_the_largest_and_the_drivers_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu(monkeypatch, 900, 1000, step=50)
    assert device_memory.graph_bytes(lambda: 2, _CUDA, 9) == 50 + 2 * 9 * (16 << 20)
    assert device_memory.graph_bytes(lambda: 0, _CUDA, 9) == 0, "this backend records none"
    assert device_memory.graph_bytes(out_of_memory, _CUDA, 9) == 0, "and this base cannot be"


def test_the_server_sizes_its_cache_by_the_largest_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Batch]
) -> None:
    on_a_gpu(monkeypatch, free=5 << 20, total=5 << 20, step=0)
    service = Service(
        settings(
            base, tmp_path, kv_cache_bytes="auto", adapter_memory_bytes=1 << 20, max_batch_tokens=40, max_num_seqs=5
        )
    )
    on_cpu = load_base(base, device=CPU, dtype=torch.float32, backend=torch_backend(CPU))
    steps.clear()
    known = ("max_positions", "vocab_size", "runner", "model")
    on_gpu = SimpleNamespace(device=_CUDA, **{name: getattr(on_cpu, name) for name in known})
    monkeypatch.setattr(decoder_engine, "SCORED_LOGITS", 7 * on_cpu.vocab_size)
    plan = DecoderPlan(cast(BaseModel, on_gpu), service.settings, service.max_rows)
    assert plan.kv_bytes() == (5 << 20) - round((1 - 0.9) * (5 << 20)) - (1 << 20)
    [batch] = steps
    assert [rows.num_rows for rows in batch.rows] == [36, 1, 1, 1, 1]
    assert [rows.num_scored for rows in batch.rows] == [7, 0, 0, 0, 0]
    assert len(batch.sampling) == 5


@pytest.mark.parametrize(("is_on", "sizes"), [(None, [[6]]), (True, [[6]]), (False, [])])
def test_a_gpus_server_records_steps_of_as_many_rows_as_run_at_once(
    is_on: bool | None, sizes: list[list[int]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves room for them beside the KV cache, and says in its first lines what they take."""
    asked: list[tuple[Any, ...]] = []

    def noted_recording(*given: Any) -> RecordedSteps:
        asked.append(given)
        return RecordedSteps(8, 99)

    on_a_gpu(monkeypatch, free=1 << 29, total=1 << 29, step=0)
    monkeypatch.setattr(decoder_engine, "record_steps", noted_recording)
    on_cpu = load_base(base, device=CPU, dtype=torch.float32, backend=torch_backend(CPU))
    measured: list[list[int]] = []

    def runner(*given: int) -> Runner:
        made = on_cpu.runner(*given)

        def record(sizes: list[int]) -> int:
            measured.append(sizes)
            return 2

        monkeypatch.setattr(made, "record", record)
        return made

    known = ("weight_bytes", "kv_bytes_per_token", "max_positions", "vocab_size")
    on_gpu = SimpleNamespace(device=_CUDA, runner=runner, model=on_cpu.model, **{n: getattr(on_cpu, n) for n in known})
    fields = {"kv_cache_bytes": "auto", "adapter_memory_bytes": 1 << 20, "host_adapter_bytes": 0, "max_num_seqs": 6}
    service = Service(settings(base, tmp_path, cuda_graphs=is_on, **fields))
    monkeypatch.setattr(service, "base", on_gpu, raising=False)
    left = (1 << 29) - round((1 - 0.9) * (1 << 29)) - (1 << 20)
    monkeypatch.setattr(decoder_engine, "take_kv_cache", lambda *_: None)
    engine = service._make_engine()  # noqa: SLF001 - all else of a start needs the device to be there
    assert measured == sizes
    assert service.kv_cache_bytes == left - (2 * 4 * (16 << 20) if sizes else 0)
    assert [(given[1], given[3]) for given in asked] == ([(engine._runner, 6)] if sizes else [])  # noqa: SLF001
    assert (("8 recorded steps", 99) in service.memory_plan()) == bool(sizes)


@pytest.mark.parametrize("is_on", [True, False])
def test_recorded_steps_are_refused_where_there_are_none(is_on: bool, base: Path, tmp_path: Path) -> None:
    assert "--cuda-graphs" in refusal_of(Service(settings(base, tmp_path, cuda_graphs=is_on)))


def test_a_fraction_of_a_gpu_is_refused_where_it_says_nothing(base: Path, tmp_path: Path) -> None:
    for fields in ({"kv_cache_bytes": 1 << 20}, {"kv_cache_bytes": None}):
        assert "--gpu-memory-fraction" in refusal_of(
            Service(settings(base, tmp_path, gpu_memory_fraction=0.5, **fields))
        )
