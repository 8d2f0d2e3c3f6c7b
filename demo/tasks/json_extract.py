"""Extraction to JSON: a sentence and the fields wanted, in any order, answered by one object with those keys.

Training and held-out examples share no phrasing and no name, place or thing; one kind of record is only held out.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from task import Example, Task

NUM_HELD_OUT = 100
MIN_FIELDS = 2
MAX_NUMBER = 99


@dataclass(frozen=True)
class Record:
    """A kind of record: its fields with the pool each draws from ("number" for integers), and its phrasings."""

    fields: Mapping[str, str]
    phrasings: Sequence[str]


TRAIN_POOLS: Mapping[str, Sequence[str]] = {
    "first": ("Maria", "John", "Aisha", "Pavel", "Yuki", "Carlos", "Emma", "Liam", "Fatima", "Sven", "Nina", "Omar"),
    "last": (
        "Lopez",
        "Smith",
        "Khan",
        "Novak",
        "Tanaka",
        "Silva",
        "Brown",
        "Murphy",
        "Haddad",
        "Berg",
        "Rossi",
        "Cohen",
    ),
    "place": ("Lisbon", "Boston", "Delhi", "Prague", "Osaka", "Madrid", "Leeds", "Dublin", "Cairo", "Oslo", "Milan"),
    "thing": (
        "blue lamp",
        "desk",
        "tea cup",
        "bike helmet",
        "red scarf",
        "oak table",
        "phone case",
        "notebook",
        "kettle",
    ),
    "day": ("Monday", "Wednesday", "Thursday", "Saturday", "2 May", "17 June", "9 October"),
    "hour": ("9:00", "10:30", "14:15", "16:45", "18:00", "11:20"),
    "topic": ("budget", "hiring", "new website", "school trip", "safety", "summer party"),
    "job": ("nurse", "plumber", "teacher", "data analyst", "chef", "lawyer"),
    "firm": ("Acme", "Northwind", "Blue Ocean", "Contoso", "Red Brick", "Sunrise Foods"),
}
HELD_OUT_POOLS: Mapping[str, Sequence[str]] = {
    "first": ("Greta", "Tomas", "Ines", "Kofi", "Hana", "Diego", "Ruth", "Vikram"),
    "last": ("Weber", "Okafor", "Duarte", "Kowalski", "Nguyen", "Larsen", "Moreau", "Patel"),
    "place": ("Vienna", "Lagos", "Porto", "Kyoto", "Quito", "Bergen", "Toronto", "Athens"),
    "thing": ("green umbrella", "camera", "wool blanket", "garden chair", "backpack", "coffee grinder", "tent"),
    "day": ("Tuesday", "Friday", "Sunday", "21 March", "8 August"),
    "hour": ("8:45", "12:10", "15:30", "19:05", "13:40"),
    "topic": ("warehouse move", "roadmap", "yearly report", "training plan"),
    "job": ("gardener", "pilot", "translator", "carpenter"),
    "firm": ("Globex", "Silver Lake", "Initech", "Green Valley"),
}
TRAIN_RECORDS = (
    Record(
        {"name": "name", "city": "place", "item": "thing", "quantity": "number", "price": "number"},
        (
            "{name} from {city} ordered {quantity} x {item} for {price} euros.",
            "Order: {quantity} pieces of {item}, {price} dollars, ship to {name} in {city}.",
            "We sent {name} ({city}) {quantity} of the {item}, which cost {price} in all.",
            "For {price} euros {name} bought the {item}, {quantity} of them, delivered to {city}.",
        ),
    ),
    Record(
        {"topic": "topic", "day": "day", "time": "hour", "place": "place", "organizer": "name"},
        (
            "{organizer} invites you to a meeting about {topic} on {day} at {time} in {place}.",
            "Meeting in {place}, {day}, {time}: {topic}. Called by {organizer}.",
            "Let us talk about {topic} with {organizer}. {place}, {day}, starting {time}.",
            "At {time} on {day} {organizer} will lead the talk on {topic} in {place}.",
        ),
    ),
    Record(
        {"passenger": "name", "origin": "place", "destination": "place", "day": "day", "seat": "number"},
        (
            "{passenger} flies from {origin} to {destination} on {day}, seat {seat}.",
            "Ticket for {passenger}: {origin} to {destination}, {day}, seat number {seat}.",
            "On {day} {passenger} leaves {origin} for {destination} and sits in seat {seat}.",
            "Seat {seat} is booked for {passenger}, travelling to {destination} from {origin} on {day}.",
        ),
    ),
    Record(
        {"name": "name", "job": "job", "company": "firm", "age": "number", "city": "place"},
        (
            "{name}, {age}, works as a {job} at {company} in {city}.",
            "Meet {name}: a {job} with {company}, {age} years old, living in {city}.",
            "{company} in {city} hired {name} ({age}) as {job}.",
            "The new {job} at {company} is {name} from {city}, aged {age}.",
        ),
    ),
)
HELD_OUT_RECORDS = (
    Record(
        TRAIN_RECORDS[0].fields,
        (
            "Please send {quantity} pieces of the {item} to {name} in {city}; the bill is {price} euros.",
            "{name} paid {price} dollars for {quantity} x {item} and lives in {city}.",
        ),
    ),
    Record(
        TRAIN_RECORDS[1].fields,
        (
            "On {day} at {time} we meet in {place} about {topic}, says {organizer}.",
            "{organizer} has set up a {topic} meeting in {place} for {day}, {time}.",
        ),
    ),
    Record(
        TRAIN_RECORDS[2].fields,
        (
            "{passenger} has seat {seat} on the {day} flight from {origin} to {destination}.",
            "From {origin} to {destination} on {day}: {passenger}, seat {seat}.",
        ),
    ),
    Record(
        TRAIN_RECORDS[3].fields,
        (
            "At {company} in {city}, {name} is a {job} and {age} years old.",
            "{name} is {age}, lives in {city} and joined {company} as a {job}.",
        ),
    ),
    Record(
        {"tenant": "name", "city": "place", "rooms": "number", "rent": "number", "start": "day"},
        (
            "{tenant} rents a flat with {rooms} rooms in {city} for {rent} euros from {start}.",
            "From {start} the flat in {city} ({rooms} rooms, rent {rent}) goes to {tenant}.",
        ),
    ),
)


def _value(rng: random.Random, pool: str, pools: Mapping[str, Sequence[str]]) -> str | int:
    if pool == "number":
        return rng.randint(2, MAX_NUMBER)
    if pool == "name":
        return f"{rng.choice(pools['first'])} {rng.choice(pools['last'])}"
    return rng.choice(pools[pool])


def _example(rng: random.Random, record: Record, pools: Mapping[str, Sequence[str]]) -> Example:
    values = {field: _value(rng, pool, pools) for field, pool in record.fields.items()}
    wanted = rng.sample(list(values), rng.randint(MIN_FIELDS, len(values)))
    text = rng.choice(record.phrasings).format(**values)
    answer = json.dumps({field: values[field] for field in wanted})
    return Example(f"Extract {', '.join(wanted)} as JSON: {text}", answer)


def train(count: int, seed: int) -> list[Example]:
    """Examples over the training records, each kind equally often."""
    rng = random.Random(seed)
    return [_example(rng, TRAIN_RECORDS[index % len(TRAIN_RECORDS)], TRAIN_POOLS) for index in range(count)]


def held_out() -> list[Example]:
    """Held-out phrasings filled with held-out values."""
    rng = random.Random(0)
    return [
        _example(rng, HELD_OUT_RECORDS[index % len(HELD_OUT_RECORDS)], HELD_OUT_POOLS) for index in range(NUM_HELD_OUT)
    ]


def is_correct(expected: str, answer: str) -> bool:
    """True if the answer as a whole is JSON and equal to the expected object."""
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except ValueError:
        return False


TASK = Task(
    name="json",
    train=train,
    held_out=held_out,
    is_correct=is_correct,
    accuracy_means="the whole answer parses as JSON and equals the expected object",
    max_tokens=96,
)
