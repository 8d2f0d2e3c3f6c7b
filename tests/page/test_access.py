"""The page where a key is wanted, below a path that a proxy puts before it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from chromium import opened
from serving import Running, serving, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key

pytest_plugins = ["page_fixtures"]


class Locked(NamedTuple):
    """A server that wants a key, and one that may ask and read, and no more."""

    server: Running
    reader: str


@pytest.fixture(scope="module")
def locked(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("data")
    reader, _ = create_key(folder / "keys.yaml", "default", (KeyScope.GENERATE, KeyScope.READ))
    config = settings(base, folder, api_key=("all",), key_file=folder / "keys.yaml", root_path="/models")
    with serving(config) as running:
        running.client.headers["Authorization"] = "Bearer all"
        assert running.put("one", adapters[3]).status_code == 201
        yield Locked(running, reader)


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser: Browser, locked: Locked) -> None:
    asked: list[str] = []
    with opened(browser) as shown:
        page = shown.page
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{locked.server.url}/models/ui")
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("This server wants a key.")
        for key in ("wrong", locked.reader):
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
            if key == "wrong":
                expect(dialog).to_contain_text("The server does not take that key.")
        expect(dialog).to_be_hidden()
        expect(page.locator("#base")).to_have_text("base")
        stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert [locked.reader in each for each in stored] == [False, True]

        page.get_by_label("Prompt").fill("hi")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#compare-said")).to_contain_text("2 of 2 have answered")
        page.get_by_role("button", name="curl").first.click()
        code = page.locator("#code-text").text_content() or ""
        assert f"{locked.server.url}/models/v1/chat/completions" in code
        assert "$SWAPLORA_API_KEY" in code
        assert locked.reader not in code
        page.get_by_role("button", name="Close").click()

        page.get_by_role("tab", name="Live").click()
        expect(page.locator("#live-said")).to_have_text("Only a key with the scope metrics:read may see the metrics.")
        page.get_by_role("tab", name="Adapters").click()
        page.get_by_role("button", name="one", exact=True).click()
        page.get_by_role("button", name="Pin", exact=True).click()
        expect(page.locator("#card .told")).to_have_text("this needs a key with the scope adapters:write")

        page.get_by_role("button", name="Key", exact=True).click()
        page.get_by_role("button", name="Forget it").click()
        expect(dialog).to_contain_text("This server wants a key.")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#adapter-list")).to_contain_text("send a valid API key")
        shown.refusals(401, 403)
        assert {url for url in asked if not url.startswith(f"{locked.server.url}/models/")} == set()


def test_who_runs_the_server_makes_and_revokes_keys(browser: Browser, locked: Locked) -> None:
    with opened(browser, bypass_csp=True, viewport={"width": 400, "height": 800}) as shown:
        page = shown.page
        page.goto(f"{locked.server.url}/models/ui")
        page.get_by_label("Key", exact=True).fill("all")
        page.keyboard.press("Enter")
        page.get_by_role("tab", name="Keys").click()
        page.get_by_label("Tenant", exact=True).fill("acme")
        page.get_by_label("adapters:write").check()
        page.get_by_label("Days").fill("7")
        page.get_by_role("button", name="Make a key").click()
        expect(page.locator("#code-text")).not_to_have_text("")
        made = page.locator("#code-text").text_content() or ""
        page.get_by_role("button", name="Close").click()
        expect(page.locator("#code-text")).to_have_text("")
        listed = locked.server.client.get("/v1/keys").json()["data"]
        [one] = [each for each in listed if each["tenant"] == "acme"]
        assert one["scopes"] == ["generate", "adapters:read", "adapters:write"]
        asked = locked.server.client.get("/v1/adapters", headers={"Authorization": f"Bearer {made}"})
        assert asked.json()["data"] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        found = Axe().run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
        page.get_by_role("button", name=f"Revoke {one['id']}").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(page.locator("#keys-said")).to_have_text(f"{one['id']} is revoked.")
        refused = locked.server.client.get("/v1/adapters", headers={"Authorization": f"Bearer {made}"})
        assert refused.status_code == 401
        shown.refusals(401)
