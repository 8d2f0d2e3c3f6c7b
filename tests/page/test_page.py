"""The page in a real browser, by clicking: what it shows is what the API says, and what it does is done."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect

from adapter_files import write_adapter
from chromium import Shown, opened
from serving import BASE, Running

pytest_plugins = ["page_fixtures"]

PARTS = ("compare", "adapters", "mixtures", "inspect", "evaluations", "live")
PROMPT = "hello"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[Shown]:
    """One that all tests use, one after the other: its files are in the browser's cache."""
    with opened(browser) as shown:
        yield shown


@pytest.fixture
def shown(tab: Shown, stocked: Running) -> Iterator[Shown]:
    tab.asked_for = ()
    tab.page.goto("about:blank")
    tab.page.goto(f"{stocked.url}/ui")
    expect(tab.page.locator(".answer")).to_have_count(3)
    yield tab
    assert tab.complaints == []


@pytest.fixture
def page(shown: Shown) -> Page:
    return shown.page


def go(page: Page, part: str) -> None:
    page.get_by_role("tab", name=part.capitalize()).click()
    expect(page.locator(f"#{part}")).to_be_visible()


def compare(page: Page, *models: str, prompt: str = PROMPT) -> list[Locator]:
    """Ask these; their answers when all are there."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Tokens").fill("24")
    expect(page.locator(".answer").nth(1)).to_be_visible()
    while page.locator(".answer").count() > len(models):
        page.get_by_role("button", name="Remove this answerer").last.click()
    while page.locator(".answer").count() < len(models):
        page.get_by_role("button", name="Add answerer").click()
    for field, model in zip(page.get_by_label("Answerer", exact=True).all(), models, strict=True):
        field.fill(model)
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#compare-said")).to_have_text(f"{len(models)} of {len(models)} have answered")
    return page.locator(".answer").all()


def text_of(answer: Locator) -> str:
    return answer.locator(".text").text_content() or ""


def told(server: Running, model: str, prompt: str = PROMPT) -> dict[str, Any]:
    """The choice that the API gives by hand."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    body |= {"logprobs": True, "return_token_ids": True}
    choice: dict[str, Any] = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]
    return choice


def num_tokens(server: Running, model: str) -> int:
    return len(told(server, model)["token_ids"])


def card(server: Running, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/v1/adapters/{name}").json()
    return found


def test_answers_are_those_of_the_api_and_their_differences_are_marked(page: Page, stocked: Running) -> None:
    boxes = [answer.bounding_box() for answer in page.locator(".answer").all()]
    answers = compare(page, BASE, "one", "two@1")
    assert [answer.bounding_box() for answer in answers][: len(boxes)] == boxes  # nothing moved while they came
    texts = [text_of(answer) for answer in answers]
    assert texts == [told(stocked, model)["message"]["content"] for model in (BASE, "one", "two@1")]
    assert len(set(texts)) == 3
    expect(answers[1].locator(".stats")).to_have_text(
        re.compile(rf"^one@1 · first after \d+ ms · [\d.]+ tok/s · {num_tokens(stocked, 'one')} tokens")
    )
    page.get_by_label("differences").check()
    pieces, others = ([*answer.locator(".text span").all_text_contents()] for answer in answers[:2])
    marked = answers[1].locator(".text .missing").count()
    assert marked == len(others) - longest_common(pieces, others) > 0
    assert answers[0].locator(".missing").count() == 0


def longest_common(left: list[str], right: list[str]) -> int:
    """The length of their longest common subsequence."""
    row = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for index, other in enumerate(right):
            before, row[index + 1] = row[index + 1], before + 1 if one == other else max(row[index], row[index + 1])
    return row[-1]


def test_each_tokens_probability_is_told(page: Page, stocked: Running) -> None:
    answer = compare(page, "one", BASE)[0]
    page.get_by_label("probability").check()
    first = told(stocked, "one")["logprobs"]["content"][0]
    answer.locator(".text").press("ArrowRight")
    chosen = answer.locator(".chosen")
    expect(chosen).to_have_count(1)
    share = re.search(r"^(\".*?\") ([\d.e+-]+) %, ", answer.locator(".detail").text_content() or "")
    assert share is not None
    assert json.loads(share[1]) == chosen.text_content()
    if first["token"] == chosen.text_content():
        assert float(share[2]) == pytest.approx(100 * 2.718281828 ** first["logprob"], rel=0.01)


def test_an_answerer_that_is_not_there_is_refused_in_its_place(shown: Shown) -> None:
    page = shown.page
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Answerer", exact=True).nth(0).fill("nobody")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator(".answer").nth(0)).to_contain_text("there is no model 'nobody'")
    expect(page.locator(".answer").nth(0).locator(".stats")).to_have_text("refused: model_not_found")
    expect(page.locator("#compare-said")).to_contain_text("have answered")
    shown.refusals(404)


def test_requests_are_told_as_curl_and_as_python(page: Page, stocked: Running) -> None:
    prompt = 'it\'s "quoted" \\ $HOME `x` ü\n世'
    answer = compare(page, "one", BASE, prompt=prompt)[0]
    expected = told(stocked, "one", prompt)["message"]["content"]
    answer.get_by_role("button", name="curl").click()
    words = shlex.split(page.locator("#code-text").text_content() or "")
    assert words[:3] == ["curl", "-s", f"{stocked.url}/v1/chat/completions"]
    given = stocked.client.post("/v1/chat/completions", json=json.loads(words[words.index("-d") + 1])).json()
    assert given["choices"][0]["message"]["content"] == expected == text_of(answer)
    page.get_by_role("button", name="Close").click()
    answer.get_by_role("button", name="Python").click()
    code, names = page.locator("#code-text").text_content() or "", dict[str, Any]()
    exec(code, names)
    assert code.endswith("\nprint(answer.choices[0].message.content)\n")
    assert names["answer"].choices[0].message.content == expected


def test_two_to_six_are_asked(page: Page) -> None:
    for _ in range(page.locator(".answer").count(), 6):
        page.get_by_role("button", name="Add answerer").click()
    expect(page.get_by_role("button", name="Add answerer")).to_be_disabled()
    for _ in range(4):
        page.get_by_role("button", name="Remove this answerer").first.click()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.get_by_role("button", name="Remove this answerer").first).to_be_disabled()


def choose_files(page: Page, folder: Path, name: str) -> None:
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    page.locator("#upload-files").set_input_files(files)
    page.locator("#upload-name").fill(name)
    page.get_by_role("button", name="Upload").click()


def test_upload_compare_and_roll_back(page: Page, stocked: Running, adapters: list[Path]) -> None:
    go(page, "adapters")
    for version, folder in ((1, adapters[3]), (2, adapters[5])):
        choose_files(page, folder, "mine")
        expect(page.locator("#upload-said")).to_have_text(f"mine@{version} is stored, and answers from now on.")
    go(page, "compare")
    first, second = (text_of(answer) for answer in compare(page, "mine@1", "mine"))
    assert (first, second) == tuple(told(stocked, name)["message"]["content"] for name in ("one", "two"))
    go(page, "adapters")
    page.get_by_role("button", name="mine", exact=True).click()
    page.get_by_role("button", name="Roll back to version 1").click()
    expect(page.locator("#card .told")).to_have_text("version 1 is current")
    assert card(stocked, "mine")["version"] == 1
    go(page, "compare")
    assert {text_of(answer) for answer in compare(page, "mine@1", "mine")} == {first}


def test_a_refusal_says_why(shown: Shown, stocked: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "bad", r=8, use_dora="maybe")
    go(shown.page, "adapters")
    choose_files(shown.page, folder, "bad")
    answer = stocked.put("bad", folder)
    assert answer.status_code == 422
    expect(shown.page.locator("#upload-said")).to_have_text(f"Refused: {answer.json()['error']['message']}")
    shown.refusals(422)


def test_files_can_be_dropped(page: Page, stocked: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sound", seed=5)
    go(page, "adapters")
    files = {path.name: list(path.read_bytes()) for path in folder.iterdir()}
    page.evaluate(
        """(files) => {
            const dataTransfer = new DataTransfer();
            for (const [name, bytes] of Object.entries(files)) {
                dataTransfer.items.add(new File([Uint8Array.from(bytes)], name));
            }
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }""",
        files,
    )
    expect(page.locator("#upload-chosen")).to_contain_text("adapter_model.safetensors (")
    page.locator("#upload-name").fill("dropped")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload-said")).to_contain_text("dropped@1 is stored")
    assert card(stocked, "dropped")["rank"] == 4


def test_pin_warm_and_delete(page: Page, stocked: Running, adapters: list[Path]) -> None:
    stocked.put("brief", adapters[0])
    stocked.put("brief", adapters[1])
    go(page, "adapters")
    page.get_by_role("button", name="brief", exact=True).click()
    row = page.locator("#adapter-list tr", has_text="brief")
    page.get_by_role("button", name="Warm").click()
    expect(page.locator("#card .told")).to_have_text("in memory")
    expect(row).to_contain_text("in memory")
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(row).to_contain_text("pinned")
    assert (card(stocked, "brief")["tier"], card(stocked, "brief")["pinned"]) == ("device", True)
    page.get_by_role("button", name="Delete version 1").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#card .told")).to_have_text("version 1 is deleted")
    assert [version["version"] for version in card(stocked, "brief")["versions"]] == [2]
    remove = page.locator("#card .actions").first.get_by_role("button", name="Delete")
    remove.click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(remove).to_be_enabled()
    assert card(stocked, "brief")["version"] == 2
    remove.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    assert stocked.client.get("/v1/adapters/brief").status_code == 404


def test_traffic_is_split_by_sliders(page: Page, stocked: Running) -> None:
    go(page, "adapters")
    page.get_by_role("button", name="two", exact=True).click()
    page.get_by_role("button", name="Split traffic").click()
    for slider in page.get_by_role("slider").all():
        slider.fill("20" if "two@2" in (slider.get_attribute("aria-label") or "") else "60")
    expect(page.locator(".alias output")).to_have_text(["75 %", "25 %"])
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#aliases-said")).to_have_text("two-live is saved: requests from now on follow it.")
    targets = stocked.client.get("/v1/aliases/two-live").json()["targets"]
    assert targets == [{"target": "two@1", "weight": 60}, {"target": "two@2", "weight": 20}]
    page.get_by_role("button", name="Delete alias two-live").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#aliases-said")).to_have_text("two-live is deleted.")
    assert stocked.client.get("/v1/aliases").json()["data"] == []


def test_an_adapter_is_inspected(page: Page, stocked: Running) -> None:
    go(page, "adapters")
    page.get_by_role("button", name="one", exact=True).click()
    page.locator("#card").get_by_role("button", name="Inspect").click()
    said = stocked.client.get("/v1/adapters/one/inspect?against=two").json()

    def count_intruders(route: Route) -> None:
        """As the server would, which takes a process and many seconds."""
        assert route.request.url.endswith("?against=two&intruders=true")
        route.fulfill(json=said | {"modules": [module | {"intruders": 7} for module in said["modules"]]})

    cells = page.locator(".heat button")
    expect(cells).to_have_count(len(said["modules"]))
    page.route("**/inspect?*intruders=true", count_intruders)
    page.get_by_label("against").fill("two")
    page.get_by_label("count intruder").check()
    page.locator("#inspect-form").get_by_role("button").click()
    expect(page.locator("#inspection")).to_contain_text(f"cosine with two@2: {said['against']['cosine']:.3g}")
    found = next(module for module in said["modules"] if module["module"] == "model.layers.1.mlp.up_proj")
    for measure in ("effective rank", "intruder dimensions", "cosine with the other"):
        page.locator("#inspection").get_by_label(measure).check()
    cell = page.get_by_role("button", name=f"up_proj, layer 1: {found['cosine']:.3g}")
    cell.click()
    side = page.get_by_role("region", name="The chosen module")
    expect(side.locator(".bar-of")).to_have_count(found["rank"])
    expect(side).to_contain_text("intruders7")
    page.keyboard.press("ArrowUp")
    expect(side).to_contain_text("up_proj, layer 0")


def test_what_the_server_does_is_shown(page: Page, stocked: Running) -> None:
    stocked.token_ids("one", [1, 2, 3])
    go(page, "live")
    row = page.locator("#live-adapters tr", has_text=re.compile("^one"))
    expect(row).to_contain_text("in memory")
    metrics = stocked.client.get("/metrics").text
    count = re.search(r'swaplora_adapter_generations_total\{adapter="one",outcome="completed"\} (\d+)', metrics)
    assert count is not None
    assert row.locator("td").all_text_contents()[4] == count[1]
    assert re.fullmatch(r"[\d.]+ KiB", page.locator(".gauge", has_text="Adapter memory").locator(".value").inner_text())


def test_tabs_are_reached_by_keys(page: Page) -> None:
    page.keyboard.press("Tab")
    for part in (*PARTS[1:], PARTS[0]):
        page.keyboard.press("ArrowRight")
        tab = page.get_by_role("tab", selected=True)
        assert page.evaluate("document.activeElement.id") == f"tab-{part}"
        expect(tab).to_have_attribute("aria-controls", part)
        expect(page.locator(f"#{part}")).to_be_visible()
    assert page.locator("[role=tabpanel]:visible").count() == 1
    page.keyboard.press("End")
    expect(page.locator("#live")).to_be_visible()


def test_the_theme_stays(page: Page) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Theme").click(click_count=2)
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(background) != light


def test_what_comes_from_the_server_is_text(browser: Browser, stocked: Running) -> None:
    """A server, or who stands between, that says markup in every field."""

    def falsify(route: Route) -> None:
        if route.request.method == "POST":
            chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "logprobs": None, "finish_reason": None}]}
            body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
            route.fulfill(body=body, content_type="text/event-stream", headers={"x-swaplora-adapter": HOSTILE})
            return
        answer = route.fetch()
        route.fulfill(response=answer, body=json.dumps(hostile(answer.json())))

    with opened(browser) as shown:
        page = shown.page
        page.route("**/v1/**", falsify)
        page.goto(f"{stocked.url}/ui")
        expect(page.locator("#base")).to_have_text(HOSTILE)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".answer .text").first).to_have_text(HOSTILE)
        page.locator(".answer").first.get_by_role("button", name="curl").click()
        page.get_by_role("button", name="Close").click()
        go(page, "adapters")
        page.locator("#adapter-list button").first.click()
        expect(page.locator("#card h2")).to_have_text(HOSTILE)
        assert (page.locator("#card").text_content() or "").count(HOSTILE) > 5
        page.get_by_role("button", name="Split traffic").click()
        go(page, "inspect")
        page.get_by_label("Adapter", exact=True).fill("one")
        page.locator("#inspect-form").get_by_role("button").click()
        expect(page.locator("#inspection h2")).to_contain_text(HOSTILE)
        assert page.locator("img, script:not([src='ui/app.js']), iframe").count() == 0
        assert page.title() == "swaplora"


def hostile(said: Any) -> Any:
    """The same with markup in the place of every text that is no kind or state."""
    if isinstance(said, dict):
        return {name: value if name in ("object", "tier", "state") else hostile(value) for name, value in said.items()}
    if isinstance(said, list):
        return [hostile(each) for each in said]
    return HOSTILE if isinstance(said, str) else said


def test_policy_keeps_foreign_script_out(browser: Browser, stocked: Running) -> None:
    with opened(browser) as shown:
        shown.page.goto(f"{stocked.url}/ui")
        shown.page.evaluate(
            """() => {
                const markup = "<img src=x onerror=\\"document.title='taken'\\">";
                try { document.body.innerHTML += markup; } catch { /* meant */ }
                const made = document.createElement("script");
                try { made.textContent = "document.title='taken'"; document.body.append(made); } catch { /* meant */ }
            }"""
        )
        assert shown.page.title() == "swaplora"
        assert any("Trusted" in line for line in shown.complaints)
        shown.complaints.clear()


def test_nothing_bars_the_way_and_nothing_is_too_wide(browser: Browser, stocked: Running) -> None:
    """axe-core's rules, on every part, filled. It may run where the policy would not let it: in this context alone."""
    stocked.client.put("/v1/aliases/split", json={"targets": [{"target": "two@1", "weight": 1}]})
    with opened(browser, bypass_csp=True, viewport={"width": 400, "height": 800}) as shown:
        page = shown.page
        page.goto(f"{stocked.url}/ui")
        for part in PARTS:
            fill(page, part)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, part
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                found = Axe().run(page).response["violations"]
                assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], (part, scheme)
    assert stocked.client.delete("/v1/aliases/split").status_code == 200


def fill(page: Page, part: str) -> None:
    """Show a part with something in it."""
    go(page, part)
    if part == "compare":
        compare(page, BASE, "one")
        page.get_by_label("differences").check()
    elif part == "adapters":
        page.get_by_role("button", name="two", exact=True).click()
        expect(page.locator(".alias")).to_have_count(1)
    elif part == "mixtures":
        expect(page.locator("#mixture-list .empty")).to_be_visible()
    elif part == "inspect":
        page.get_by_label("Adapter", exact=True).fill("one")
        page.locator("#inspect-form").get_by_role("button").click()
        expect(page.locator(".heat")).to_be_visible()
    elif part == "evaluations":
        page.get_by_label("Task, a line").fill('{"prompt": "a", "answer": "b"}')
        page.get_by_label("Models").fill("one, two")
        page.locator("#evaluation-tokens").fill("1")
        page.get_by_role("button", name="Evaluate").click()
        expect(page.locator("#evaluation")).to_contain_text("done: 2 of 2 answers")
        page.get_by_text("Set a gate").click()
        expect(page.locator("#gate-versions table")).to_be_visible()
    else:
        expect(page.locator("#live-adapters table")).to_be_visible()
