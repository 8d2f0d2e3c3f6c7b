"""The page's evaluations and gates, by clicking: what is shown is what the API says, and what is done is done."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from chromium import Shown, opened
from serving import BASE, Running
from swaplora_server.service.gates import judging

pytest_plugins = ["page_fixtures"]

PROMPTS = [f"number {number}:" for number in range(4)]


@pytest.fixture(scope="module", autouse=True)
def looks_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "LOOK_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def stocked(server: Running, adapters: list[Path]) -> Running:
    for name, folder in (("one", adapters[3]), ("mine", adapters[4])):
        assert server.put(name, folder).status_code == 201
    return server


@pytest.fixture
def shown(browser: Browser, stocked: Running) -> Iterator[Shown]:
    with opened(browser) as shown:
        shown.page.goto(f"{stocked.url}/ui#evaluations")
        expect(shown.page.locator("#evaluations")).to_be_visible()
        yield shown


@pytest.fixture
def page(shown: Shown) -> Page:
    return shown.page


def task_of(server: Running, model: str) -> str:
    """That `model` does without a fault, as a task file."""
    body = {"model": model, "max_tokens": 4, "temperature": 0}
    said = [server.client.post("/v1/completions", json=body | {"prompt": prompt}).json() for prompt in PROMPTS]
    items = ({"prompt": p, "answer": one["choices"][0]["text"]} for p, one in zip(PROMPTS, said, strict=True))
    return "\n".join(map(json.dumps, items))


def card(server: Running, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/v1/adapters/{name}").json()
    return found


def test_a_task_is_asked_and_what_came_of_it_is_shown(page: Page, stocked: Running, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(task_of(stocked, "one"))
    page.get_by_label("or a task file").set_input_files(file)
    page.get_by_label("Models").fill(f"{BASE}, one,mine@1")
    page.locator("#evaluation-tokens").fill("4")
    page.get_by_role("button", name="Evaluate").click()
    view = page.locator("#evaluation")
    expect(view).to_contain_text("done: 12 of 12 answers")
    told = stocked.client.get(f"/v1/evaluations/{stocked.client.get('/v1/evaluations').json()['data'][0]['id']}").json()
    rows = view.locator("table").first.locator("tbody tr").all()
    cells = [row.locator("td").all_text_contents()[:5] for row in rows]
    assert cells == [
        [
            result["model"] if result["name"] is None or "@" in result["model"] else f"{result['model']} (1)",
            metric,
            "4",
            f"{found['mean']:.3f}",
            f"{found['low']:.3f} to {found['high']:.3f}",
        ]
        for result in told["results"]
        for metric, found in result["metrics"].items()
    ]
    assert cells[3][3] == "1.000"
    assert view.locator("table").last.locator("tbody tr").count() == 3
    page.get_by_role("button", name="Delete the evaluation").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#evaluation-list")).to_contain_text("No evaluations yet")


def test_one_is_watched_and_cancelled(page: Page, stocked: Running) -> None:
    task = "\n".join(json.dumps({"prompt": str(number), "answer": "b"}) for number in range(500))
    page.get_by_label("Task, a line").fill(task)
    page.get_by_label("Models").fill("one")
    admission = stocked.service.admissions.admit(stocked.service.max_rows)  # live requests go first
    page.get_by_role("button", name="Evaluate").click()
    expect(page.locator("#evaluation-list").get_by_role("progressbar")).to_be_visible()
    page.get_by_role("button", name="Cancel the evaluation").click()
    expect(page.locator("#evaluation")).to_contain_text("cancelled: 0 of 500")
    admission.release()


def test_a_refusal_says_why(shown: Shown) -> None:
    page = shown.page
    page.get_by_label("Task, a line").fill('{"prompt": "a"}')
    page.get_by_label("Models").fill("one")
    page.get_by_role("button", name="Evaluate").click()
    expect(page.locator("#evaluation-said")).to_contain_text("Refused: task: line 1: give exactly one of answer")
    shown.refusals(400)


def test_a_worse_version_is_stopped_forced_and_rolled_back_by_clicks(
    page: Page, stocked: Running, adapters: list[Path]
) -> None:
    served = stocked.token_ids("mine", [1, 2, 3])
    page.get_by_label("Of adapter", exact=True).select_option("mine")
    expect(page.locator("#gate-told")).to_have_text("mine has no gate: each new version is current at once.")
    page.get_by_text("Set a gate").click()
    page.get_by_label("Task that a new version").fill(task_of(stocked, "mine"))
    page.get_by_label("Least score").fill("0.9")
    page.locator("#gate-tokens").fill("4")
    page.get_by_role("button", name="Set the gate").click()
    expect(page.locator("#gate-told")).to_contain_text("New versions must score 0.9 at 4 items")
    body = {"task": task_of(stocked, "mine"), "min_score": 0.9, "max_tokens": 4, "stop": ["no such text"]}
    assert stocked.client.put("/v1/adapters/mine/gate", json=body).status_code == 200
    with page.expect_response(lambda answer: answer.request.method == "PUT"):
        page.get_by_role("button", name="Set the gate").click()
    assert stocked.client.get("/v1/adapters/mine/gate").json()["stop"] == ["no such text"]
    page.get_by_role("tab", name="Adapters").click()
    files = [adapters[5] / "adapter_config.json", adapters[5] / "adapter_model.safetensors"]
    page.locator("#upload-files").set_input_files(files)
    page.locator("#upload-name").fill("mine")
    page.get_by_role("button", name="Upload").click()
    stored = "mine@2 is stored, and mine stands for version 1 until it has passed the gate."
    expect(page.locator("#upload-said")).to_have_text(stored)
    page.get_by_role("tab", name="Evaluations").click()
    page.get_by_label("Of adapter", exact=True).select_option("mine")
    versions = page.locator("#gate-versions")
    expect(versions).to_contain_text("mine@2: min_score: its score is")
    assert stocked.token_ids("mine", [1, 2, 3]) == served
    promote = page.get_by_role("button", name="Make version 2 current")
    promote.click()
    expect(page.get_by_role("dialog")).to_contain_text("min_score: its score is")
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert card(stocked, "mine")["version"] == 1
    promote.click()
    page.get_by_role("dialog").get_by_role("button", name="Make it current").click()
    expect(versions).to_contain_text("current, forced")
    assert stocked.token_ids("mine", [1, 2, 3]) != served
    page.get_by_role("button", name="Make version 1 current").click()
    expect(page.locator("#gate-said")).to_have_text("Version 1 is current.")
    assert stocked.token_ids("mine", [1, 2, 3]) == served
    page.get_by_role("button", name="Remove the gate").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(page.locator("#gate-told")).to_have_text("mine has no gate: each new version is current at once.")
    assert card(stocked, "mine")["gated"] is False


def test_an_adapter_is_shared(shown: Shown, stocked: Running) -> None:
    page = shown.page
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("button", name="one", exact=True).click()
    for given, wanted in (("zeta, acme", ["zeta", "acme"]), ("*", ["*"]), ("", [])):
        page.locator("#card").get_by_role("button", name="Share").click()
        page.get_by_label("Tenants").fill(given)
        page.keyboard.press("Enter")
        expect(page.locator("#card .told")).to_contain_text("shared with")
        assert card(stocked, "one")["shared_with"] == wanted
    page.locator("#card").get_by_role("button", name="Share").click()
    page.get_by_label("Tenants").fill("Not a tenant")
    page.get_by_role("dialog").get_by_role("button", name="Share").click()
    expect(page.locator("#card .told")).to_contain_text("shared_with")
    shown.refusals(400)
