"""What is read of a request for routers to remember."""

from pydantic_core import to_json

from swaplora_server.cluster.front.route_key import key_of_body, key_of_path


def test_a_name_that_no_adapter_can_have_is_not_remembered() -> None:
    long = "x" * 1000
    body = to_json({"model": long, "adapters": [{"name": "sql"}, {"name": "y" * 128}, {"name": long}]})
    assert key_of_body(body, "acme", "base").adapters == ("acme~sql", f"acme~{'y' * 128}")
    assert key_of_path(f"/v1/adapters/{long}", "acme").adapters == ()


def test_what_is_named_beside_a_body_or_by_number_has_a_home_too() -> None:
    raw = to_json(
        {"model": "base", "prompt": "x", "lora": [{"id": 3, "scale": 1}, {"id": 4, "scale": 0}, {"id": "x"}, 5]}
    )
    assert key_of_body(raw, "default", "base").adapters == ("#3",)
    assert key_of_body(to_json({"model": "base", "prompt": "x"}), "acme", "base", "sql").adapters == ("acme~sql",)


def test_a_version_is_told_apart_from_others_of_its_name() -> None:
    digest = "sha256:0123456789abcdef"
    named = ["sql@3", "base:sql@3", "sql", f"sql@{digest}", f"sql@{digest[:-4]}", "sql@", "sql@x", "sql:3", "sql@0"]
    found = key_of_body(to_json({"model": "base", "lora_path": named, "prompt": "x"}), "acme", "base").adapters
    assert found == ("acme~sql@3", "acme~sql", f"acme~sql@{digest[:-4]}")
