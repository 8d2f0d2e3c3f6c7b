"""A shop customer's message, answered by the name of its intent alone.

Training and held-out messages share no sentence and no item.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from task import Example, Task, is_same_text


@dataclass(frozen=True)
class Phrasings:
    """How customers voice one intent, written for training and apart from that for the held-out set."""

    train: Sequence[str]
    held_out: Sequence[str]


OPENINGS = ("", "", "", "Hi, ", "Hello! ", "Good morning, ", "Hey there. ", "Excuse me, ")
CLOSINGS = ("", "", "", " Thanks!", " Thank you.", " Please help.", " Best regards", " Please advise.")
TRAIN_ITEMS = ("shoes", "lamp", "jacket", "phone case", "coffee machine", "headphones", "desk", "novel", "bike")
HELD_OUT_ITEMS = ("sweater", "kettle", "keyboard", "backpack", "sofa", "watch")
INTENTS: Mapping[str, Phrasings] = {
    "track_order": Phrasings(
        (
            "where is my {item}?",
            "can you tell me where my order is?",
            "my parcel has not arrived yet, where is it?",
            "I want to track order {number}.",
            "when will my {item} arrive?",
            "has order {number} been shipped?",
            "I am still waiting for my {item}.",
            "what is the status of my delivery?",
            "the tracking page shows nothing for my {item}.",
            "is my package on its way?",
        ),
        (
            "my {item} should have been here yesterday.",
            "how long until order {number} gets here?",
            "any news on the delivery of my {item}?",
            "could you check where my package is?",
            "did you already send the {item} out?",
            "I never received my parcel.",
            "what day will my order come?",
            "is the {item} I bought on its way?",
            "give me the tracking for {number}.",
            "the courier has not turned up with my {item}.",
        ),
    ),
    "cancel_order": Phrasings(
        (
            "I want to cancel my order.",
            "please cancel order {number}.",
            "I no longer need the {item}, cancel it.",
            "can I still cancel the {item} I ordered?",
            "stop my order, I ordered by mistake.",
            "do not ship the {item}, I changed my mind.",
            "how do I cancel a purchase?",
            "I ordered the {item} twice, cancel one.",
            "call off order {number} before it ships.",
            "I would like to withdraw my order for the {item}.",
        ),
        (
            "cancel the {item} please.",
            "I changed my mind about the {item}, do not send it.",
            "is it too late to cancel {number}?",
            "I clicked buy by mistake, please stop the order.",
            "order {number} has to be cancelled.",
            "could you cancel what I ordered this morning?",
            "I don't want the {item} any more, stop the order.",
            "please don't ship order {number}.",
            "I need my purchase of the {item} cancelled.",
            "how can I call off my order?",
        ),
    ),
    "return_item": Phrasings(
        (
            "I want to return the {item}.",
            "how do I send the {item} back?",
            "the {item} does not fit, can I return it?",
            "I need a return label for my {item}.",
            "can I exchange the {item} for a bigger one?",
            "what is your return policy?",
            "I do not like the {item}, I want to give it back.",
            "where do I send a return?",
            "I would like to bring back the {item} I bought.",
            "the {item} is the wrong size, I want to swap it.",
        ),
        (
            "how can I return my {item}?",
            "the {item} is too small, I want to send it back.",
            "can I give the {item} back within two weeks?",
            "please send me a return label.",
            "I'd like to exchange my {item} for another size.",
            "what are the rules for returns?",
            "I want to bring the {item} back to you.",
            "where can I return order {number}?",
            "I don't like how the {item} looks, can I swap it?",
            "which address do I send the {item} back to?",
        ),
    ),
    "refund_status": Phrasings(
        (
            "where is my refund?",
            "when do I get my money back?",
            "I sent the {item} back and still have no refund.",
            "has my refund for order {number} been paid?",
            "I am waiting for the money for the {item}.",
            "how long does a refund take?",
            "my refund is late.",
            "you promised to pay me back for the {item}.",
            "the refund is not on my bank account.",
            "I was told I would be refunded last week.",
        ),
        (
            "when will I be refunded for the {item}?",
            "I still have not got my money back.",
            "is the refund for {number} on its way?",
            "why does my refund take so long?",
            "I returned the {item} weeks ago, where is my money?",
            "did you pay out my refund?",
            "no refund has reached my account yet.",
            "how many days until I get my money for the {item}?",
            "please check the refund of order {number}.",
            "I was supposed to be paid back for the {item}.",
        ),
    ),
    "damaged_item": Phrasings(
        (
            "my {item} arrived broken.",
            "the {item} does not work.",
            "there is a crack in the {item}.",
            "the box was open and the {item} is scratched.",
            "my new {item} is faulty.",
            "the {item} stopped working after one day.",
            "a part of the {item} is missing.",
            "I got a damaged {item}.",
            "the {item} has a hole in it.",
            "the {item} fell apart when I took it out.",
        ),
        (
            "the {item} came damaged.",
            "my {item} is broken.",
            "there are scratches all over the {item}.",
            "the {item} has a defect.",
            "the {item} was cracked when I opened the box.",
            "I turned on the {item} and it does not work.",
            "one piece of my {item} is missing.",
            "the {item} broke on the first day.",
            "you sent me a faulty {item}.",
            "the {item} is torn.",
        ),
    ),
    "payment_problem": Phrasings(
        (
            "my card was declined.",
            "I was charged twice for the {item}.",
            "the payment does not go through.",
            "you took too much money from my card.",
            "I cannot pay with my credit card.",
            "checkout shows a payment error.",
            "why was I charged for order {number} two times?",
            "paying by bank transfer fails.",
            "the amount on my bill for the {item} is wrong.",
            "my voucher was not deducted from the price.",
        ),
        (
            "my credit card is not accepted.",
            "I paid twice for order {number}.",
            "the payment for the {item} failed.",
            "there is a wrong amount on my bill.",
            "checkout says my card is declined.",
            "you charged my card two times.",
            "I get an error when I try to pay for the {item}.",
            "why was I billed too much for the {item}?",
            "my bank transfer does not go through.",
            "the discount was not taken off my bill.",
        ),
    ),
    "change_address": Phrasings(
        (
            "I moved, please change my address.",
            "can you send the {item} to another address?",
            "I need to update my delivery address.",
            "the address on order {number} is wrong.",
            "please ship to my office instead.",
            "I typed the wrong street for my order.",
            "how do I change where my {item} is delivered?",
            "my new address is 5 Mill Road.",
            "deliver order {number} to my neighbour instead.",
            "I want my parcel sent to a different city.",
        ),
        (
            "please deliver the {item} to a different address.",
            "my address has changed.",
            "I gave you the wrong address for {number}.",
            "can the {item} be sent to my work instead?",
            "how can I update my address?",
            "I have moved to 12 Park Lane.",
            "the street on my order is wrong.",
            "send my parcel to my sister's address instead.",
            "I need to change the delivery address of order {number}.",
            "could you ship the {item} to another city?",
        ),
    ),
    "stock_question": Phrasings(
        (
            "is the {item} in stock?",
            "when will the {item} be available again?",
            "do you have the {item} in blue?",
            "the {item} is sold out, will you get more?",
            "do you sell a smaller {item}?",
            "is there a {item} in size L?",
            "how many of the {item} do you have left?",
            "which colors does the {item} come in?",
            "will the {item} be restocked?",
            "can I still get the old model of the {item}?",
        ),
        (
            "do you still have the {item}?",
            "is the {item} available in red?",
            "when do you get more of the {item}?",
            "do you have a bigger {item}?",
            "the {item} says out of stock, when is it back?",
            "does the {item} come in other colors?",
            "are there any {item} left?",
            "will you have the {item} again soon?",
            "do you sell the {item} in size M?",
            "is the new {item} in stock yet?",
        ),
    ),
    "account_access": Phrasings(
        (
            "I forgot my password.",
            "I cannot log in.",
            "my account is locked.",
            "how do I reset my password?",
            "the login code never arrives.",
            "the site says my email is unknown.",
            "please unlock my account.",
            "I want to delete my account.",
            "how do I change my email?",
            "someone else is using my account.",
        ),
        (
            "I can't sign in to my account.",
            "my password does not work.",
            "please help me reset the password.",
            "I am locked out of my account.",
            "I did not get the login code.",
            "how can I delete my profile and account?",
            "the site does not know my email when I log in.",
            "I want to use a new email for my account.",
            "I forgot how to log in.",
            "I think my account was hacked.",
        ),
    ),
    "human_agent": Phrasings(
        (
            "I want to talk to a person.",
            "can I speak to someone?",
            "please connect me to an agent.",
            "this bot does not help, get me a human.",
            "give me your phone number.",
            "I want to speak to the manager.",
            "is there a real person here?",
            "let me chat with your staff.",
            "transfer me to customer service.",
            "can somebody call me back?",
        ),
        (
            "let me speak to a human.",
            "can a real person help me?",
            "I need to talk to someone from your staff.",
            "put me through to an agent.",
            "please call me.",
            "I'd rather talk to a person than a bot.",
            "get me your manager.",
            "is there somebody I can speak to?",
            "which number can I call to reach customer service?",
            "connect me with a human agent.",
        ),
    ),
}


def _message(rng: random.Random, phrasing: str, items: Sequence[str]) -> str:
    body = phrasing.format(item=rng.choice(items), number=rng.randint(10_000, 99_999))
    opening = rng.choice(OPENINGS)
    if not opening.endswith(", "):
        body = body[0].upper() + body[1:]
    return opening + body + rng.choice(CLOSINGS)


def train(count: int, seed: int) -> list[Example]:
    """Messages in the training sentences, every intent equally often."""
    rng = random.Random(seed)
    intents = list(INTENTS.items())
    return [
        Example(_message(rng, rng.choice(phrasings.train), TRAIN_ITEMS), intent)
        for intent, phrasings in (intents[index % len(intents)] for index in range(count))
    ]


def held_out() -> list[Example]:
    """Each held-out sentence once, about held-out items."""
    rng = random.Random(0)
    return [
        Example(_message(rng, phrasing, HELD_OUT_ITEMS), intent)
        for intent, phrasings in INTENTS.items()
        for phrasing in phrasings.held_out
    ]


TASK = Task(
    name="intent",
    train=train,
    held_out=held_out,
    is_correct=is_same_text,
    accuracy_means="the answer is the intent's name and nothing else",
    max_tokens=16,
)
