"""What may be uploaded, and what is refused with every reason while the server and its other streams go on."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from serving import BASE, Running, stream_chat

PROMPT = list(range(30, 50))
Tensors = dict[str, torch.Tensor]


def wrong_prefix(tensors: Tensors) -> Tensors:
    return {name.replace("base_model.model.", "model."): tensor for name, tensor in tensors.items()}


def extra_tensor(tensors: Tensors) -> Tensors:
    return tensors | {"base_model.model.model.norm.weight": torch.ones(32)}


def base_layer(tensors: Tensors) -> Tensors:
    return tensors | {"base_model.model.lm_head.base_layer.weight": torch.ones(259, 32)}


def missing_half(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("1.mlp.up_proj.lora_B.weight")}


def missing_module(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "1.mlp.up_proj" not in name}


def other_shapes(tensors: Tensors) -> Tensors:
    return {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()}


def not_a_number(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if "0.self_attn.v_proj.lora_B" in name)
    tensors[name][0, 0] = float("nan")
    return tensors


FAULTS: list[tuple[Callable[[Tensors], Tensors], list[str]]] = [
    (wrong_prefix, ["model.model.layers.0.self_attn.q_proj.lora_A.weight", "layers.1.mlp.down_proj"]),
    (extra_tensor, ["model.norm.weight"]),
    (base_layer, ["lm_head.base_layer.weight"]),
    (missing_half, ["1.mlp.up_proj"]),
    (missing_module, ["1.mlp.up_proj"]),
    (other_shapes, ["0.self_attn.q_proj", "64", "32"]),
    (not_a_number, ["0.self_attn.v_proj.lora_B"]),
]


def damaged(folder: Path, base: Path, fault: Callable[[Tensors], Tensors]) -> Path:
    tiny.save_adapter(folder, base, seed=3, rank=4)
    path = folder / "adapter_model.safetensors"
    save_file(fault(load_file(path)), path)
    return folder


@pytest.mark.parametrize(("fault", "named"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_file_that_does_not_apply_whole_is_refused_by_name_beside_good_streams(
    fault: Callable[[Tensors], Tensors], named: list[str], server: Running, base: Path, tmp_path: Path
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        control = await stream_chat(client, BASE, "go on", 60, ignore_eos=True)
        stream = asyncio.create_task(stream_chat(client, BASE, "go on", 60, ignore_eos=True))
        answer = await asyncio.to_thread(server.put, "damaged", damaged(tmp_path / "bad", base, fault))
        assert (await stream).token_ids == control.token_ids
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] in ("invalid_adapter", "unsupported_adapter")
    for key in named:
        assert key in answer.json()["error"]["message"]
    assert server.generate("damaged", PROMPT).status_code == 404


def test_all_reasons_come_in_one_answer(server: Running, base: Path, tmp_path: Path) -> None:
    folder = damaged(tmp_path / "bad", base, missing_half)
    tiny.edit_config(folder, layer_replication=[[0, 1]], task_type="SEQ_2_SEQ_LM", velora_config={"rank": 1})
    message = server.put("damaged", folder).json()["error"]["message"]
    assert all(field in message for field in ("layer_replication", "task_type", "velora_config"))


def test_a_bad_replace_leaves_the_old_version_serving(server: Running, base: Path, tmp_path: Path) -> None:
    server.put("kept", tiny.save_adapter(tmp_path / "good", base, seed=1))
    before = server.token_ids("kept", PROMPT)
    assert server.put("kept", damaged(tmp_path / "bad", base, not_a_number)).status_code == 422
    assert server.token_ids("kept", PROMPT) == before
    assert server.client.get("/v1/adapters/kept").json()["version"] == 1


def test_the_same_bytes_again_are_the_same_version(server: Running, adapters: list[Path]) -> None:
    first, again = server.put("same", adapters[0]), server.put("same", adapters[0])
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["version"] == again.json()["version"] == 1


def test_preconditions(server: Running, adapters: list[Path]) -> None:
    digest = server.put("conditional", adapters[0], **{"If-None-Match": "*"}).json()["digest"]
    for headers in ({"If-None-Match": "*"}, {"If-Match": "sha256:" + "0" * 64}):
        answer = server.put("conditional", adapters[1], **headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (412, "precondition_failed")
    assert server.put("conditional", adapters[1], **{"If-Match": f'"{digest}"'}).json()["version"] == 2
    assert server.put("conditional", adapters[2], **{"If-Match": "*"}).json()["version"] == 3
    assert server.put("new", adapters[2], **{"If-Match": "*"}).status_code == 412


def test_an_adapter_lives_from_upload_to_delete(server: Running, adapters: list[Path]) -> None:
    card = server.put("life", adapters[4]).json()
    assert (card["rank"], card["kind"], card["state"], card["base"]) == (8, ["lora"], "stored", BASE)
    assert card["targets"] == sorted(tiny.ALL_LINEAR)
    server.token_ids("life", PROMPT)
    listed = server.client.get("/v1/adapters").json()["data"]
    assert [entry["state"] for entry in listed if entry["name"] == "life"] == ["resident"]
    assert server.client.get("/v1/models/life").json()["root"] == card["digest"]
    resident = server.service.registry.resident_bytes
    assert server.client.delete("/v1/adapters/life").json()["state"] == "deleted"
    assert server.service.registry.resident_bytes == resident - 4 * card["parameters"]
    for method, path in [("GET", "/v1/adapters/life"), ("DELETE", "/v1/adapters/life"), ("GET", "/v1/models/life")]:
        answer = server.client.request(method, path)
        code = "model_not_found" if "models" in path else "adapter_not_found"
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_a_deleted_version_is_gone_and_the_newest_left_serves(server: Running, adapters: list[Path]) -> None:
    for folder in adapters[:3]:
        server.put("several", folder)
    expected = server.token_ids("several@2", PROMPT)
    assert server.client.delete("/v1/adapters/several?version=3").json()["versions"] == [3]
    assert server.token_ids("several", PROMPT) == expected
    assert server.generate("several@3", PROMPT).json()["error"]["code"] == "version_not_found"
    assert server.put("several", adapters[4]).json()["version"] == 4


@pytest.mark.parametrize("name", [BASE, ".hidden", "-dash", "a b", "ü", "a" * 129, "a@1", "a:b"])
def test_a_name_that_no_adapter_may_have(server: Running, adapters: list[Path], name: str) -> None:
    answer = server.put(name, adapters[0])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter_name")


@pytest.fixture
def parts(adapters: list[Path]) -> dict[str, bytes]:
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {part: (adapters[0] / name).read_bytes() for part, name in names.items()}


def multipart(*parts: tuple[str, bytes], end: bytes = b"--X--\r\n") -> dict[str, Any]:
    body = b"".join(
        b'--X\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + content + b"\r\n"
        for name, content in parts
    )
    return {"content": body + end, "headers": {"Content-Type": "multipart/form-data; boundary=X"}}


def test_malformed_bodies_are_refused_and_leave_nothing(server: Running, parts: dict[str, bytes]) -> None:
    config, weights = ("config", parts["config"]), ("weights", parts["weights"])
    bodies: dict[str, dict[str, Any]] = {
        "no weights": multipart(config),
        "no config": multipart(weights),
        "nothing": multipart(),
        "twice": multipart(config, config, weights),
        "another part": multipart(config, weights, ("extra", b"x")),
        "a thousand parts": multipart(*[(f"p{n}", b"") for n in range(1001)]),
        "cut short": multipart(config, weights, end=b""),
        "no boundary": {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        "another boundary": multipart(config, weights)
        | {"headers": {"Content-Type": "multipart/form-data; boundary=Y"}},
        "not multipart": {"content": b"PK\x03\x04", "headers": {"Content-Type": "application/zip"}},
        "json": {"json": {"config": 1}},
        "long header": multipart(("c" * 10_000, b""), config, weights),
    }
    for what, body in bodies.items():
        answer = server.client.put("/v1/adapters/malformed", **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), what
    assert not list((server.service.settings.data_dir / "staging").iterdir())
    assert server.client.put("/v1/adapters/malformed", **multipart(config, weights)).status_code == 201


def test_the_clients_file_name_is_never_used(server: Running, parts: dict[str, bytes]) -> None:
    files = {part: ("../../../escaped", content) for part, content in parts.items()}
    assert server.client.put("/v1/adapters/escaping", files=files).status_code == 201
    assert not list(server.service.settings.data_dir.parent.glob("**/escaped"))


def test_a_config_that_is_too_large_is_refused_while_it_arrives(server: Running, parts: dict[str, bytes]) -> None:
    body = multipart(("config", b" " * (2 << 20)), ("weights", parts["weights"]))
    answer = server.client.put("/v1/adapters/large", **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "adapter_too_large")


def test_another_bases_name_is_a_warning_not_an_error(server: Running, base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(tmp_path / "a", base, seed=9)
    tiny.edit_config(folder, base_model_name_or_path="https://example.org/../../other")
    answer = server.put("foreign", folder)
    assert answer.status_code == 201
    assert json.dumps(answer.json()["warnings"]).count("example.org") == 1
