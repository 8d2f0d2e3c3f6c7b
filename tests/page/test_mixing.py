"""The page's splits with a canary and its mixtures, by clicking: what is shown is what the API says."""

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from chromium import opened
from serving import Running

pytest_plugins = ["page_fixtures"]

PROMPT = "ab <i> c"


def alias(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/v1/aliases/two-live").json()
    return found


def test_a_canary_is_set_is_seen_to_step_back_and_is_tried_again(browser: Browser, stocked: Running) -> None:
    with opened(browser) as shown:
        page = shown.page
        page.goto(f"{stocked.url}/ui#adapters")
        page.get_by_role("button", name="two", exact=True).click()
        page.get_by_role("button", name="Split traffic").click()
        page.get_by_role("slider", name="Weight of two@1").fill("10")
        expect(page.get_by_label("% failed")).to_be_hidden()
        page.get_by_label("Canary").select_option("two@1")
        page.get_by_label("% failed").fill("0.7")
        page.get_by_label("requests", exact=False).fill("5")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#aliases-said")).to_contain_text("two-live is saved")
        asked = {"target": "two@1", "max_error_rate": 0.007, "min_requests": 5, "window_seconds": 300}
        assert alias(stocked)["canary"] == asked | {"stepped_back": None, "reason": None}
        registry = stocked.service.registry
        canary = registry.names.index.alias("two-live").canary
        assert canary is not None
        assert registry.step_back("two-live", canary, "1 of 5 requests failed in 300 s")
        page.reload()
        state = page.locator(".alias .told")
        expect(state).to_contain_text("two@1 gets no more requests since")
        expect(state).to_contain_text("1 of 5 requests failed in 300 s")
        page.get_by_role("slider", name="Weight of two@1").fill("10")
        page.get_by_role("button", name="Save").click()
        expect(state).to_contain_text("two@1 is tried")
        assert alias(stocked)["canary"] == asked | {"stepped_back": None, "reason": None}
        warning = page.locator(".alias .actions").get_by_text("Saving removes the canary two@1")
        expect(warning).to_be_hidden()
        sides = page.get_by_label("Target", exact=True).all()
        [side] = [each for each in sides if each.input_value() == "two@1"]
        side.fill("two@")
        expect(warning).to_be_visible()
        side.fill("two@1")
        expect(warning).to_be_hidden()
        page.get_by_label("Canary").select_option("none")
        expect(warning).to_be_visible()
        page.get_by_role("button", name="Save").click()
        expect(state).to_have_count(0)
        assert "canary" not in alias(stocked)
    stocked.client.delete("/v1/aliases/two-live")


def test_a_mixture_is_made_traced_and_deleted(browser: Browser, stocked: Running) -> None:
    with opened(browser) as shown:
        page = shown.page
        page.goto(f"{stocked.url}/ui#mixtures")
        page.locator("#mixture-name").fill("both")
        page.get_by_label("Members, with").fill("one, nobody")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#mixture-said")).to_contain_text("Refused: members: ")
        shown.refusals(404)
        page.get_by_label("Members, with").fill("one, two@1")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#mixture-said")).to_have_text("both is saved: requests from now on follow it.")
        expect(page.locator("#mixture-list td").nth(1)).to_have_text("one, two@1")
        trace(page)
        said = stocked.client.post("/v1/mixtures/both/trace", json={"prompt": PROMPT}).json()
        layers = sorted({module["layer"] for module in said["modules"]})
        cells = page.locator(".heat button")
        expect(cells).to_have_count(len(layers) * len(said["tokens"]))
        assert page.locator(".heat thead span").all_text_contents() == [token["text"] for token in said["tokens"]]
        token = next(number for number, each in enumerate(said["tokens"]) if each["text"] == "<")
        inside = [module for module in said["modules"] if module["layer"] == 1]
        mean = sum(module["members"][token][0] for module in inside) / len(inside)  # of one that is all: the second's
        cell = cells.nth(len(said["tokens"]) + token)
        page.get_by_label("two@1", exact=True).check()
        assert float(cell.evaluate("each => each.style.getPropertyValue('--heat')")) == pytest.approx(mean)
        cell.click()
        side = page.get_by_role("region", name="The chosen token")
        expect(side.locator("h3")).to_have_text('"<", layer 1')
        expect(side.locator("dd")).to_have_text([f"{said['members'][each['members'][token][0]]} 1" for each in inside])
        page.keyboard.press("ArrowUp")
        expect(side.locator("h3")).to_have_text('"<", layer 0')
        page.get_by_role("button", name="Delete mixture both").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator("#mixture-said")).to_have_text("both is deleted.")
        expect(page.locator("#trace")).to_be_hidden()
    assert stocked.client.get("/v1/mixtures").json()["data"] == []


def trace(page: Page) -> None:
    page.get_by_label("Text to trace").fill(PROMPT)
    page.get_by_role("button", name="Trace").click()
    expect(page.locator("#trace-view .heat")).to_be_visible()


def test_nothing_bars_the_way_of_either(browser: Browser, stocked: Running) -> None:
    """axe-core's rules, light and dark, on a small screen. It may run where the policy would not let it."""
    targets = [{"target": "two@1", "weight": 1}, {"target": "one", "weight": 1}]
    body = {"targets": targets, "canary": {"target": "two@1", "max_error_rate": 0.05}}
    assert stocked.client.put("/v1/aliases/two-live", json=body).status_code == 200
    made = stocked.client.post("/v1/mixtures", json={"name": "both", "members": ["one", "two"], "top_k": 2})
    assert made.status_code == 201
    with opened(browser, bypass_csp=True, viewport={"width": 400, "height": 800}) as shown:
        page = shown.page
        for part in ("adapters", "mixtures"):
            page.goto("about:blank")
            page.goto(f"{stocked.url}/ui#{part}")
            if part == "mixtures":
                page.get_by_role("button", name="both", exact=True).click()
                trace(page)
            else:
                expect(page.get_by_label(re.compile("requests"))).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, part
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                found = Axe().run(page).response["violations"]
                assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], (part, scheme)
    for path in ("aliases/two-live", "mixtures/both"):
        assert stocked.client.delete(f"/v1/{path}").status_code == 200
