"""Versions over HTTP: rolled back, pinned, warmed, kept or let go; and failures that the card tells of."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

import tiny
from serving import BASE, Running, serving, settings

PROMPT = list(range(30, 50))


def card(server: Running, name: str) -> dict[str, object]:
    found: dict[str, object] = server.client.get(f"/v1/adapters/{name}").json()
    return found


def wait_state(server: Running, name: str, state: str) -> None:
    deadline = time.monotonic() + 30
    while card(server, name)["state"] != state:
        assert time.monotonic() < deadline, card(server, name)
        time.sleep(0.01)


def test_a_roll_back_reaches_the_next_request_and_a_restart(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with serving(settings(base, tmp_path)) as server:
        for folder in adapters[:3]:
            server.put("rolled", folder)
        second, third = (server.token_ids(f"rolled@{n}", PROMPT) for n in (2, 3))
        assert second != third
        answer = server.client.patch("/v1/adapters/rolled", json={"current": 2})
        assert (answer.status_code, answer.json()["version"]) == (200, 2)
        assert [version["version"] for version in answer.json()["versions"]] == [1, 2, 3]
        said = server.generate("rolled", PROMPT)
        assert said.headers["x-swaplora-adapter"] == "rolled@2"
        assert said.json()["choices"][0]["token_ids"] == second
        assert server.client.get("/v1/models/rolled").json()["root"] == answer.json()["digest"]
    with serving(settings(base, tmp_path)) as server:
        assert server.token_ids("rolled", PROMPT) == second
        assert server.put("rolled", adapters[3]).json()["version"] == 4
        assert server.client.patch("/v1/adapters/rolled", json={"current": 3}).json()["version"] == 3
        assert server.token_ids("rolled", PROMPT) == third


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"current": 9}, 404, "version_not_found"),
        ({"current": 9, "pinned": True}, 404, "version_not_found"),
        ({"current": 0}, 400, "invalid_request"),
        ({"current": True}, 400, "invalid_request"),
        ({"current": 2**31}, 400, "invalid_request"),
        ({"pinned": "yes"}, 400, "invalid_request"),
        ({"pin": True}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
        ([], 400, "invalid_request"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(
    server: Running, adapters: list[Path], body: object, status: int, code: str
) -> None:
    server.put("unchanged", adapters[0])
    before = card(server, "unchanged")
    answer = server.client.patch("/v1/adapters/unchanged", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert card(server, "unchanged") == before
    assert server.client.patch("/v1/adapters/nobody", json={"pinned": True}).status_code == 404


def test_retention_spares_what_is_current_or_led_to(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, keep_versions=2)) as server:
        server.put("kept", adapters[0])
        server.client.put("/v1/aliases/stable", json={"target": "kept@1"})
        for folder in adapters[1:5]:
            server.put("kept", folder)
        assert [v["version"] for v in card(server, "kept")["versions"]] == [1, 4, 5]  # type: ignore[attr-defined]
        server.client.patch("/v1/adapters/kept", json={"current": 4})
        server.client.delete("/v1/aliases/stable")
        server.put("kept", adapters[6])
        assert [v["version"] for v in card(server, "kept")["versions"]] == [5, 6]  # type: ignore[attr-defined]


def test_a_refused_replace_is_told_on_the_card_until_a_good_one(
    server: Running, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    server.put("told", adapters[0])
    bad = tiny.save_adapter(tmp_path / "bad", base, seed=3)
    tiny.edit_config(bad, use_dora=True)
    assert server.put("told", bad).status_code == 422
    failure = card(server, "told")["last_failure"]
    assert isinstance(failure, dict)
    assert "lora_magnitude_vector" in failure["reason"]
    assert time.time() - failure["at"] < 60
    assert server.put("told", adapters[1], **{"If-None-Match": "*"}).status_code == 412
    unlike = server.client.put("/v1/adapters/told", json={"source": "hf://org/repo"})
    assert unlike.status_code == 400
    told = card(server, "told")["last_failure"]
    assert isinstance(told, dict)
    assert "--allow-source" in told["reason"]
    server.put("told", adapters[1])
    assert card(server, "told")["last_failure"] is None
    assert server.put("never", bad).status_code == 422
    assert server.client.get("/v1/adapters/never").status_code == 404


@pytest.fixture
def small(base: Path, adapters: list[Path], tmp_path: Path) -> Iterator[Running]:
    """Memory for two adapters of rank 8, three of which are uploaded."""
    with serving(settings(base, tmp_path, adapter_memory_bytes=2 * 4 * parameters(8) + 100)) as running:
        for number in range(3):
            folder = tiny.save_adapter(tmp_path / f"r8-{number}", base, seed=number, rank=8)
            running.put(f"r8-{number}", folder)
        running.put("large", adapters[6])
        yield running


def parameters(rank: int) -> int:
    """Of an adapter of this rank on every linear of the tiny base."""
    sizes = (32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32)
    return 2 * rank * sum(sizes)


def test_warming_loads_and_a_pin_stays(small: Running, tmp_path: Path) -> None:
    assert card(small, "r8-0")["state"] == "stored"
    assert small.client.post("/v1/adapters/r8-0/warm").json()["state"] == "resident"
    assert small.client.patch("/v1/adapters/r8-1", json={"pinned": True}).json()["pinned"] is True
    wait_state(small, "r8-1", "resident")
    for name in ("r8-2", "r8-0", "r8-2", "r8-0"):
        small.token_ids(name, PROMPT)
    assert [card(small, f"r8-{n}")["state"] for n in range(3)] == ["resident", "resident", "stored"]
    small.client.patch("/v1/adapters/r8-1", json={"pinned": False})
    for name in ("r8-2", "r8-0"):
        small.token_ids(name, PROMPT)
    assert card(small, "r8-1")["state"] == "stored"


def test_a_pin_follows_the_name_and_survives_a_restart(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with serving(settings(base, tmp_path)) as server:
        server.put("steady", adapters[0])
        server.client.patch("/v1/adapters/steady", json={"pinned": True})
        wait_state(server, "steady", "resident")
        assert server.put("steady", adapters[1]).json()["pinned"] is True
        wait_state(server, "steady", "resident")
    with serving(settings(base, tmp_path)) as server:
        wait_state(server, "steady", "resident")
        server.client.delete("/v1/adapters/steady")
        assert server.put("steady", adapters[0]).json()["pinned"] is False


def test_pins_that_do_not_fit_are_refused(small: Running, base: Path, tmp_path: Path) -> None:
    for name in ("r8-0", "r8-1"):
        assert small.client.patch(f"/v1/adapters/{name}", json={"pinned": True}).status_code == 200
    answer = small.client.patch("/v1/adapters/r8-2", json={"pinned": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "memory_full")
    replaced = small.put("r8-0", tiny.save_adapter(tmp_path / "larger", base, seed=5, rank=9))
    assert (replaced.status_code, replaced.json()["error"]["code"]) == (507, "memory_full")
    assert card(small, "r8-0")["version"] == 1
    waited = small.generate("r8-2", PROMPT)  # pinned adapters leave it no room, and waiting would not help
    assert (waited.status_code, waited.json()["error"]["code"]) == (507, "memory_full")
    assert small.token_ids(BASE, PROMPT)


def test_pins_that_no_longer_fit_are_named_at_the_start_and_still_served(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    room = 4 * parameters(8) + 100
    with serving(settings(base, tmp_path / "data", adapter_memory_bytes=2 * room)) as server:
        for number in range(2):
            server.put(f"p{number}", tiny.save_adapter(tmp_path / f"p{number}", base, seed=number, rank=8))
            server.client.patch(f"/v1/adapters/p{number}", json={"pinned": True})
        expected = [server.token_ids(f"p{number}", PROMPT) for number in range(2)]
    with (
        capture_logs() as logs,
        serving(settings(base, tmp_path / "data", adapter_memory_bytes=room)) as server,
    ):
        assert [server.token_ids(f"p{number}", PROMPT) for number in range(2)] == expected
    named = {log["adapter"] for log in logs if "not all pinned" in log["event"]}
    assert named
    assert named <= {"p0", "p1"}


def test_a_delete_that_would_pin_what_does_not_fit_is_refused(small: Running, base: Path, tmp_path: Path) -> None:
    large, little = (tiny.save_adapter(tmp_path / f"r{rank}", base, seed=9, rank=rank) for rank in (12, 4))
    small.put("x", large)
    small.put("x", little)
    for name in ("x", "r8-0"):
        assert small.client.patch(f"/v1/adapters/{name}", json={"pinned": True}).status_code == 200
    for answer in (
        small.client.patch("/v1/adapters/x", json={"current": 1}),
        small.client.delete("/v1/adapters/x?version=2"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "memory_full")
    assert card(small, "x")["version"] == 2
    small.client.patch("/v1/adapters/x", json={"pinned": False})
    assert small.client.delete("/v1/adapters/x?version=2").status_code == 200
    assert card(small, "x")["version"] == 1


def test_what_can_never_be_loaded_is_refused_when_it_is_uploaded(small: Running, adapters: list[Path]) -> None:
    answer = small.put("huge", adapters[7])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "adapter_too_large")
    for path in ("/v1/adapters/nobody/warm", "/v1/adapters/r8-0@9/warm"):
        assert small.client.post(path).status_code == 404


def test_an_inspection_gives_the_singular_values_of_the_delta(server: Running, base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(tmp_path / "a", base, seed=4, rank=3, alpha=6, target_modules=["q_proj"])
    server.put("inspected", folder)
    found = server.client.get("/v1/adapters/inspected/inspect").json()
    assert [module["module"] for module in found["modules"]] == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    delta = 2 * tensors[f"{first}B.weight"] @ tensors[f"{first}A.weight"]
    expected = torch.linalg.svdvals(delta)[:3].tolist()
    assert found["modules"][0]["singular_values"] == pytest.approx(expected, rel=1e-4)
    assert found["modules"][0]["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
    assert 1 < found["modules"][0]["effective_rank"] <= 3
    assert not any("q_proj" in warning for warning in found["warnings"])


@pytest.mark.parametrize("factor", [1e38, 1e24, 1e12, 1, 1e-12, 1e-38])
def test_an_inspection_of_any_finite_adapter_is_in_finite_numbers(
    server: Running, base: Path, tmp_path: Path, factor: float
) -> None:
    folder = tiny.save_adapter(tmp_path / "a", base, seed=4, rank=3, alpha=3, target_modules=["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = [torch.linalg.svdvals(b.double() @ a.double())[:3] for a, b in pairs(tensors)]
    save_file({name: tensor * factor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    assert server.put("extreme", folder).status_code in (200, 201)
    modules = server.client.get("/v1/adapters/extreme/inspect").json()["modules"]
    for module, values in zip(modules, plain, strict=True):
        expected = (values * factor * factor).tolist()
        assert module["singular_values"] == pytest.approx(expected, rel=1e-3, abs=0)
        assert module["norm"] == pytest.approx(math.hypot(*expected), rel=1e-3, abs=0)
        assert 1 < module["effective_rank"] <= 3


def pairs(tensors: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every module, in order of name."""
    return [(tensors[name], tensors[name.replace("lora_A", "lora_B")]) for name in sorted(tensors) if "lora_A" in name]
