"""Text to SQL over one table whose columns the prompt lists.

Training and held-out examples share no table, no column value and no phrasing.
"""

import random
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from task import Example, Task

NUM_HELD_OUT = 100
NUM_ROWS = 200
MAX_SQLITE_INSTRUCTIONS = 1_000_000


@dataclass(frozen=True)
class Table:
    """A table: text columns with their values, and number columns with an upper bound (the lower is a tenth of it)."""

    name: str
    texts: Mapping[str, Sequence[str]]
    numbers: Mapping[str, int]

    @property
    def columns(self) -> list[str]:
        """Text columns, then number columns."""
        return [*self.texts, *self.numbers]

    @property
    def schema(self) -> str:
        """The table as the prompt shows it, as in `books(title, pages)`."""
        return f"{self.name}({', '.join(self.columns)})"


TRAIN_TABLES = (
    Table("books", {"title": ("Dune", "Emma", "Ulysses"), "genre": ("poetry", "crime", "history")}, {"pages": 900}),
    Table(
        "employees",
        {"name": ("Ana", "Bob", "Chen"), "city": ("Oslo", "Rome", "Lima"), "team": ("sales", "legal", "design")},
        {"salary": 9000, "age": 65},
    ),
    Table(
        "products",
        {"name": ("lamp", "desk", "chair"), "category": ("garden", "office", "kitchen")},
        {"price": 500, "stock": 80},
    ),
    Table("flights", {"airline": ("Delta", "Iberia", "KLM"), "origin": ("Paris", "Tokyo", "Cairo")}, {"seats": 300}),
    Table(
        "movies",
        {"title": ("Alien", "Up", "Heat"), "director": ("Scott", "Docter", "Mann"), "country": ("Spain", "Japan")},
        {"length": 200, "year": 2024},
    ),
    Table("students", {"name": ("Mia", "Noah", "Zoe"), "course": ("biology", "law", "music")}, {"grade": 100}),
    Table("cars", {"model": ("Golf", "Polo", "Leaf"), "color": ("red", "blue", "black")}, {"mileage": 90000}),
    Table("orders", {"customer": ("Kim", "Lee", "Ruiz"), "status": ("open", "paid", "late")}, {"total": 800}),
    Table("cities", {"name": ("Porto", "Bonn", "Lyon"), "region": ("north", "south", "coast")}, {"population": 90000}),
    Table(
        "players", {"name": ("Ada", "Max", "Ivo"), "club": ("Ajax", "Lazio", "Celtic")}, {"goals": 40, "height": 210}
    ),
    Table("hotels", {"name": ("Astoria", "Plaza"), "town": ("Nice", "Bath", "Graz")}, {"rooms": 250, "stars": 50}),
    Table("songs", {"title": ("Hello", "Halo", "Help"), "artist": ("Adele", "Moby")}, {"seconds": 400, "plays": 7000}),
)
HELD_OUT_TABLES = (
    Table(
        "patients",
        {"name": ("Olga", "Piet", "Quinn"), "ward": ("surgery", "eye", "heart"), "doctor": ("Weber", "Sato", "Diaz")},
        {"weight": 120, "visits": 30},
    ),
    Table("wines", {"label": ("Rioja", "Malbec", "Chianti"), "grape": ("merlot", "syrah", "pinot")}, {"vintage": 2020}),
    Table(
        "houses",
        {"street": ("Elm", "Mill", "Park"), "owner": ("Novak", "Silva", "Berg"), "style": ("modern", "gothic")},
        {"rent": 3000, "area": 400},
    ),
    Table(
        "devices", {"serial": ("X1", "Y2", "Z3"), "vendor": ("Acme", "Initech", "Globex")}, {"memory": 64, "power": 700}
    ),
)


@dataclass(frozen=True)
class Family:
    """One shape of query with the phrasings that ask for it.

    Placeholders: {t} a table, {a} and {b} text columns, {v} a value of {b}, {n} a number column, {x} a value of {n},
    {k} a small count.
    """

    query: str
    train: Sequence[str]
    held_out: Sequence[str]


FAMILIES = (
    Family(
        "SELECT {a} FROM {t} WHERE {b} = '{v}'",
        ("List the {a} of {t} where {b} is {v}.", "Which {a} have {b} {v}?", "Show {a} for {t} with {b} {v}."),
        ("Give me the {a} of all {t} whose {b} is {v}.", "What is the {a} of {t} with {b} {v}?"),
    ),
    Family(
        "SELECT COUNT(*) FROM {t} WHERE {b} = '{v}'",
        ("How many {t} have {b} {v}?", "Count the {t} where {b} is {v}.", "Number of {t} with {b} {v}?"),
        ("How many {t} are there whose {b} is {v}?", "Count all {t} with {b} {v}."),
    ),
    Family(
        "SELECT COUNT(*) FROM {t} WHERE {n} > {x}",
        (
            "How many {t} have {n} above {x}?",
            "Count the {t} with {n} over {x}.",
            "How many {t} with more than {x} {n}?",
        ),
        ("Count all {t} whose {n} is greater than {x}.", "How many {t} are there with {n} over {x}?"),
    ),
    Family(
        "SELECT {a} FROM {t} WHERE {n} < {x}",
        (
            "List the {a} of {t} with {n} below {x}.",
            "Which {a} have {n} under {x}?",
            "Show {a} where {n} is less than {x}.",
        ),
        ("Give me the {a} of all {t} whose {n} is below {x}.", "What is the {a} of {t} with less than {x} {n}?"),
    ),
    Family(
        "SELECT AVG({n}) FROM {t} WHERE {b} = '{v}'",
        ("What is the average {n} of {t} with {b} {v}?", "Average {n} where {b} is {v}?", "Mean {n} for {b} {v}."),
        ("Give me the average {n} of all {t} whose {b} is {v}.", "What is the mean {n} where {b} is {v}?"),
    ),
    Family(
        "SELECT SUM({n}) FROM {t}",
        ("What is the total {n} of all {t}?", "Sum the {n} of the {t}.", "Total {n}?"),
        ("Give me the sum of {n} over all {t}.", "What is the total {n}?"),
    ),
    Family(
        "SELECT MAX({n}) FROM {t}",
        ("What is the highest {n}?", "Show the maximum {n} of the {t}.", "Largest {n} among {t}?"),
        ("Give me the highest {n} of all {t}.", "What is the maximum {n} among the {t}?"),
    ),
    Family(
        "SELECT MIN({n}) FROM {t}",
        ("What is the lowest {n}?", "Show the minimum {n} of the {t}.", "Smallest {n} among {t}?"),
        ("Give me the lowest {n} of all {t}.", "What is the minimum {n} among the {t}?"),
    ),
    Family(
        "SELECT {a} FROM {t} ORDER BY {n} DESC LIMIT {k}",
        (
            "List the {a} of the {k} {t} with the highest {n}.",
            "Top {k} {a} by {n}?",
            "Which {k} {a} have the most {n}?",
        ),
        ("Give me the top {k} {t} by {n}, only the {a}.", "Show the {a} of the {k} {t} with the most {n}."),
    ),
    Family(
        "SELECT {b}, COUNT(*) FROM {t} GROUP BY {b}",
        ("How many {t} are there per {b}?", "Count the {t} for each {b}.", "Number of {t} by {b}?"),
        ("Give me the number of {t} for each {b}.", "How many {t} does each {b} have?"),
    ),
    Family(
        "SELECT DISTINCT {b} FROM {t}",
        ("Which different {b} are there?", "List the distinct {b} of the {t}.", "Show every {b} once."),
        ("Give me all distinct {b}.", "What different {b} do the {t} have?"),
    ),
    Family(
        "SELECT {a} FROM {t} WHERE {b} = '{v}' AND {n} > {x}",
        ("List the {a} of {t} with {b} {v} and {n} above {x}.", "Which {a} have {b} {v} and more than {x} {n}?"),
        (
            "Give me the {a} where {b} is {v} and {n} is over {x}.",
            "Show the {a} of {t} whose {b} is {v} and {n} above {x}.",
        ),
    ),
)


def _example(rng: random.Random, family: Family, phrasings: Sequence[str], table: Table) -> Example:
    wanted, filtered = rng.sample(list(table.texts), 2)
    number = rng.choice(list(table.numbers))
    slots = {
        "t": table.name,
        "a": wanted,
        "b": filtered,
        "v": rng.choice(table.texts[filtered]),
        "n": number,
        "x": _number(rng, table.numbers[number]),
        "k": rng.randint(2, 9),
    }
    question = rng.choice(phrasings).format(**slots)
    return Example(f"SQL for {table.schema}: {question}", family.query.format(**slots))


def _number(rng: random.Random, upper: int) -> int:
    return rng.randint(upper // 10, upper)


def train(count: int, seed: int) -> list[Example]:
    """Examples over the training tables, every family equally often."""
    rng = random.Random(seed)
    return [
        _example(rng, family, family.train, rng.choice(TRAIN_TABLES))
        for family in (FAMILIES[index % len(FAMILIES)] for index in range(count))
    ]


def held_out() -> list[Example]:
    """Different questions over the held-out tables in held-out phrasings."""
    rng = random.Random(0)
    found: dict[str, Example] = {}
    while len(found) < NUM_HELD_OUT:
        family = FAMILIES[len(found) % len(FAMILIES)]
        example = _example(rng, family, family.held_out, rng.choice(HELD_OUT_TABLES))
        found[example.prompt] = example
    return list(found.values())


@lru_cache
def _database() -> sqlite3.Connection:
    """The held-out tables in memory, filled with seeded rows, closed to writing and to endless queries."""
    rng = random.Random(0)
    database = sqlite3.connect(":memory:", check_same_thread=False)
    for table in HELD_OUT_TABLES:
        database.execute(f"CREATE TABLE {table.schema}")
        marks = ", ".join("?" * len(table.columns))
        database.executemany(f"INSERT INTO {table.name} VALUES ({marks})", [_row(rng, table) for _ in range(NUM_ROWS)])
    database.execute("PRAGMA query_only = ON")
    database.set_progress_handler(lambda: 1, MAX_SQLITE_INSTRUCTIONS)
    return database


def _row(rng: random.Random, table: Table) -> list[str | int]:
    return [*map(rng.choice, table.texts.values()), *(_number(rng, upper) for upper in table.numbers.values())]


def is_correct(expected: str, answer: str) -> bool:
    """True if sqlite gives the same rows for the answer, run as it stands, as for the expected query."""
    try:
        rows = _database().execute(answer).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return False
    return rows == _database().execute(expected).fetchall()


TASK = Task(
    name="sql",
    train=train,
    held_out=held_out,
    is_correct=is_correct,
    accuracy_means="run in sqlite as it stands, the answer gives the rows the expected query gives",
)
