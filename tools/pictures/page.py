"""`make picture`: docs/page.png, the README's first picture, of the page on the embedded base with the demo adapters.

Asks the base, sql and json one question, and shows where their answers differ. Needs Chromium.
"""

import tempfile
from pathlib import Path

from playwright.sync_api import expect

from chromium import chromium, opened
from repository import ROOT
from server_process import process
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base

PICTURE = ROOT / "docs" / "page.png"
QUESTION, NUM_ANSWERERS = "What is the capital of France?", 3


def main() -> None:
    base = ensure_embedded_base(Settings().cache_dir, lambda _step: None)
    flags = ["--adapter-dir", str(ROOT / "demo"), "--served-model-name", "smollm2-135m-instruct"]
    with (
        tempfile.TemporaryDirectory() as folder,
        process(base, Path(folder), *flags) as (_, client),
        chromium() as browser,
        opened(browser, viewport={"width": 1280, "height": 625}, color_scheme="light") as shown,
    ):
        page = shown.page
        page.goto(f"{client.base_url}/ui")
        names = page.get_by_label("Answerer", exact=True)
        expect(names).to_have_count(NUM_ANSWERERS)
        for field, name in zip(names.all(), ("smollm2-135m-instruct", "sql", "json"), strict=True):
            field.fill(name)
        page.get_by_label("Prompt").fill(QUESTION)
        for _ in range(2):  # the second time adapters are loaded and the kernels warm
            page.get_by_role("button", name="Run").click()
            expect(page.locator("#compare-said")).to_have_text(f"{NUM_ANSWERERS} of {NUM_ANSWERERS} have answered")
        page.get_by_label("differences").check()
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    main()
