"""What the documentation names is there, and what users meet is in the documentation."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
from fastapi.routing import APIRoute
from typer.main import get_command

from repository import ROOT
from serving import Running
from swaplora_server.cli import app
from swaplora_server.config import Settings
from swaplora_server.http import errors, evaluations, operations, pooling, routes
from swaplora_server.http.pooling.score_wire import RerankBody, ScoreBody
from swaplora_server.http.pooling.wire import ClassifyBody, EmbeddingBody, PoolingBody
from swaplora_server.http.wire import ChatBody, CompletionBody

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = (ROOT / "server/swaplora_server", ROOT / "adapters/swaplora_adapters")
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?:\.?[\w-]+/)+(?:[\w.-]+\.\w+)?|[\w-]+\.(?:py|cpp|h|md|toml|yaml)")
NAME = re.compile(r"[A-Z]+[a-z]\w*(?:\.\w+)*|[a-z]+(?:_[a-z]+)+")  # a class, or snake case
NAMES = r"`[\w.]+`(?:(?:,|,? and)\s+`[\w.]+`)*"
FILE_LINK = r"\[`[^`]+`\]\(([^)\s]+\.py)\)"
# names, and the file that is said to have them: "`name` of [`file`](…)", "[`file`](…): `name`"
IN_FILE = re.compile(rf"({NAMES})\s+(?:(?:in|of)\s+|\(){FILE_LINK}")
FILE_HAS = re.compile(rf"{FILE_LINK}(?::\s+|\s+\()({NAMES})")
THREAD = re.compile(r"(?:Thread|Executor|Workers|Offload)\(.*?['\"]([a-z][a-z-]+)['\"]")
TARGET = re.compile(r"\bmake ([a-z-]+)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
SETTING = re.compile(r"^\| `(\w+)` \| (?:`(.+?)`)? *\|", re.MULTILINE)
# of docker, helm, mypy and all
FOREIGN_FLAGS = {
    *("--build-arg", "--detach", "--file", "--from-literal", "--help", "--profile", "--set", "--strict", "--wait")
}
METRIC = ("swaplora_", "vllm:")
FOREIGN_NAMES = {
    "BitsAndBytesConfig",
    "Upgrade",
    "adapter_names",
    "pre_classifier",
    "track_order",
    "use_gks",
}  # of others
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_pages_are_there() -> None:
    pages = "adapters api architecture benchmarks clients evaluations glossary operations scaling training"
    assert {page.name for page in PAGES} == {"README.md", "CONTRIBUTING.md", *(f"{name}.md" for name in pages.split())}


@each_page
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    assert [link for link in LINK.findall(page.read_text()) if not _leads_somewhere(page, link)] == []


@each_page
def test_every_path_exists(page: Path) -> None:
    assert [path for path in _code(page) if FILE.fullmatch(path) and not _is_there(page, path)] == []


@each_page
def test_every_name_exists(page: Path) -> None:
    named = {name for name in _code(page) if NAME.fullmatch(name) and not name.startswith(METRIC)} - FOREIGN_NAMES
    assert {name for name in named if not _words().issuperset(name.split("."))} == set()


@each_page
def test_every_name_is_in_the_file_that_stands_beside_it(page: Path) -> None:
    elsewhere = [
        (name, file.name) for name, file in _placed_names(page) if not _defined(file).issuperset(name.split("."))
    ]
    assert elsewhere == []


def test_names_that_stand_beside_a_file_are_found() -> None:
    assert len(list(_placed_names(ROOT / "docs/architecture.md"))) > 10


@each_page
def test_every_make_target_exists(page: Path) -> None:
    assert {target for text in _code(page) for target in TARGET.findall(text)} - _make_targets() == set()


def test_every_make_target_is_explained_to_contributors() -> None:
    assert _missing_in("../CONTRIBUTING.md", {f"make {target}" for target in _make_targets() - {"help"}}) == []


@each_page
def test_every_flag_exists(page: Path) -> None:
    assert {flag for text in _code(page) for flag in FLAG.findall(text)} - _flags() - FOREIGN_FLAGS == set()


def test_every_command_is_in_the_operations() -> None:
    documented = {code for code in _code(ROOT / "docs/operations.md") if re.fullmatch("swaplora [a-z ]+", code)}
    assert documented == {command for command, _ in _commands(get_command(app), "swaplora")}


def test_every_room_is_in_the_architecture() -> None:
    rooms = {f"{init.parent.name}/" for package in PACKAGES for init in package.glob("*/__init__.py")}
    assert rooms - set(_code(ROOT / "docs/architecture.md")) == set()


def test_every_folder_of_tests_is_explained_to_contributors() -> None:
    folders = {f"tests/{test.parent.name}" for test in (ROOT / "tests").glob("*/*.py")}
    assert folders - set(_code(ROOT / "CONTRIBUTING.md")) == set()


def test_every_thread_is_in_the_architecture() -> None:
    named = {
        name for package in PACKAGES for file in package.rglob("*.py") for name in THREAD.findall(file.read_text())
    }
    assert len(named) > 10
    assert named - set(_code(ROOT / "docs/architecture.md")) == set()


def test_every_error_code_is_in_the_api() -> None:
    assert _missing_in("api.md", errors._STATUS) == []  # noqa: SLF001 - the one table


def test_every_route_is_in_the_api() -> None:
    assert _missing_in("api.md", set(_routes())) == []


def test_every_field_that_is_honoured_is_in_the_api() -> None:
    assert (
        _missing_in(
            "api.md",
            {
                *CompletionBody.model_fields,
                *ChatBody.model_fields,
                *EmbeddingBody.model_fields,
                *ClassifyBody.model_fields,
                *PoolingBody.model_fields,
                *ScoreBody.model_fields,
                *RerankBody.model_fields,
            },
        )
        == []
    )


def test_the_metrics_are_those_of_the_operations(server: Running) -> None:
    told = set(re.findall(r"^# TYPE ((?:swaplora_|vllm:)\w+) ", server.client.get("/metrics").text, re.MULTILINE))
    assert len(told) > 10
    documented = {name for name in _code(ROOT / "docs/operations.md") if name.startswith(METRIC)}
    assert documented == told


def test_every_setting_is_in_the_operations_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    documented = dict(SETTING.findall((ROOT / "docs/operations.md").read_text()))
    assert documented.keys() == Settings.model_fields.keys()
    assert Settings(**{name: default for name, default in documented.items() if default}) == Settings()


def _missing_in(page: str, names: Iterable[str]) -> list[str]:
    """Those that no code of the page has as a word."""
    text = " ".join(_code(ROOT / "docs" / page))
    return [name for name in sorted(names) if not re.search(rf"(?<![\w/]){re.escape(name)}(?![\w/])", text)]


@cache
def _code(page: Path) -> tuple[str, ...]:
    """What stands in backticks, and each line of the blocks between fences."""
    text = page.read_text()
    blocks = [line for block in FENCE.findall(text) for line in block.splitlines()]
    return (*blocks, *CODE.findall(FENCE.sub("", text)))


def _leads_somewhere(page: Path, link: str) -> bool:
    if "://" in link:
        return True
    path, _, heading = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and target.is_relative_to(ROOT) and (not heading or heading in _headings(target))


def _headings(page: Path) -> set[str]:
    """As GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def _is_there(page: Path, path: str) -> bool:
    """Beside the page, in the repository, or in one of the packages."""
    return any((folder / path).exists() for folder in (page.parent, ROOT, *PACKAGES))


@cache
def _make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def _words() -> frozenset[str]:
    """Of all source files of the packages."""
    files = (file for package in PACKAGES for kind in ("py", "cpp", "h") for file in package.rglob(f"*.{kind}"))
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text()))


def _placed_names(page: Path) -> Iterator[tuple[str, Path]]:
    """Each name that a page says is in a file, with that file."""
    text = page.read_text()
    placed = [*IN_FILE.findall(text), *((names, link) for link, names in FILE_HAS.findall(text))]
    yield from ((name, page.parent / link) for names, link in placed for name in CODE.findall(names))


@cache
def _defined(file: Path) -> frozenset[str]:
    """What a file defines or assigns, and not what it only uses."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return frozenset(names)


@cache
def _flags() -> frozenset[str]:
    """Of all commands of `swaplora` and of the programs in tools."""
    programs = "".join(file.read_text() for file in (ROOT / "tools").rglob("*.py"))
    params = [param for _, command in _commands(get_command(app), "swaplora") for param in command.params]
    options = {option for param in params for option in (*param.opts, *param.secondary_opts)}
    return frozenset(options).union(re.findall(r'add_argument\("(--[\w-]+)"', programs))


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """By what one types. A command that takes settings has their options once it is called."""
    inner_commands = getattr(command, "commands", {})
    for inner_name, inner in inner_commands.items():
        yield from _commands(inner, f"{name} {inner_name}")
    if not inner_commands:
        yield name, command.make_context(name, [], resilient_parsing=True).command


def _routes() -> Iterator[str]:
    """As `GET /v1/models`."""
    for package in (routes, operations, pooling, evaluations):
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            router = getattr(import_module(module.name), "router", None)
            for route in router.routes if router else ():
                assert isinstance(route, APIRoute)
                yield from (f"{method} {route.path.replace(':path', '')}" for method in route.methods or ())
