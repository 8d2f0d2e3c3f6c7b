"""What is read of a request for routers to remember."""

from pydantic_core import to_json

from swaplora_server.cluster.route_key import key_of_body, key_of_path


def test_a_name_that_no_adapter_can_have_is_not_remembered() -> None:
    long = "x" * 1000
    body = to_json({"model": long, "adapters": [{"name": "sql"}, {"name": "y" * 128}, {"name": long}]})
    assert key_of_body(body, "acme", "base").adapters == ("acme~sql", f"acme~{'y' * 128}")
    assert key_of_path(f"/v1/adapters/{long}", "acme").adapters == ()
