"""A made-up person's records with identifiers planted in them, and with decoys that only look like some: what a redactor is measured on.

Nothing here knows how redaction works. Values come from ``planted_names.py`` and ``planted_numbers.py``; this file puts them into
messages, replies, e-mails, subject lines and commits: at the beginning, in the middle, at the end, in quotes, next to punctuation, twice
in a record and in several records.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cdcda_mobile.history import Record
from planted_names import name_tables
from planted_numbers import number_tables
from planted_values import HEX, Value, fill, token

PER_KIND, QUICK_PER_KIND = 30, 12
TWICE, ACROSS = 6, 4  # every sixth value stands on both sides of a record, every fourth in a second one


@dataclass(frozen=True)
class Decoy:
    """A text that is nobody's identifier and must reach the teacher as it is."""

    kind: str
    text: str
    record: str


@dataclass(frozen=True)
class Planted:
    """Records with what was put into them; ``held_out`` are records of the same person that hold neither."""

    records: tuple[Record, ...]
    held_out: tuple[Record, ...]
    values: tuple[Value, ...]
    decoys: tuple[Decoy, ...]


# Sentences of those who write to the person, and of the person. {x} is the value with the word it is known by.

_MESSAGES: dict[str, tuple[str, ...]] = {
    "person": (
        "{x} asked me for the slides again.", "Hi, this is {x}, we met at the workshop.", "Could you send the minutes to {x}, please?",
        "The new tenant is called {x}.",
        'Somebody who signs as "{x}" left a parcel here.', "We hired {x} (finally!) and I am relieved.", "Thanks again, {x}",
    ),
    "email": (
        "{x} bounced twice this morning.", "You can reach me at {x}.", "Please cc {x}, otherwise the thread gets lost.",
        'The form says "{x}" is already taken.', "My new address: {x}", "Did ({x}) ever answer you?",
    ),
    "phone": (
        "{x} is the number of the plumber.", "Call me on {x} once you are on the platform.", "My mobile changed, it is now {x}",
        "If nobody opens, ring {x}, they always pick up.", "Tel.: {x}; after lunch is best.", 'He wrote "{x}" on a napkin.',
    ),
    "address": (
        "{x} is where the party starts.", "We moved to {x}.", "Please ship the lamp to {x}, they close early.",
        "The keys are at the neighbour's ({x}).", "Deliver to: {x}", "I grew up at {x} and still dream of that kitchen.",
    ),
    "iban": (
        "{x} is the account for the rent.", "Please transfer the deposit to {x}.", "IBAN: {x}",
        "The club's account, {x}, takes donations too.", 'My bank says "{x}" is correct.', "Send it to {x} and tell me when it is done.",
    ),
    "card": (
        "{x} was declined at the petrol station.", "Use my card {x}, it is the blue one.", "They charged {x} twice!",
        "The hotel wants a card: {x}", "Is ({x}) still the card on file?", "Card no. {x}, expires soon.",
    ),
    "national_id": (
        "{x} is on the form already.", "For the contract they need my {x}.", "My {x}, as you asked.",
        "The clerk wrote {x} on the wrong page.", "HR still has no papers; here you go: {x}", "Is ({x}) what they print on the payslip?",
    ),
    "account": (
        "{x} is what the hotline asks for first.", "Please mention {x} when you call them.", "It is under {x}.",
        "They lost my file ({x}) again.", "Reference for the refund: {x}", 'The letter says "{x}", can you check?',
    ),
    "secret": (
        "{x} works on staging as well.", "Here is the login, {x}", "Do not post this anywhere, {x} and then restart.", "I rotated it: {x}",
        "The old one leaked, so please use {x} from now on.", "Found this in the logs ({x}), is it yours?",
    ),
    "ip": (
        "{x} does not answer to ping.", "The printer moved to {x}.", "Can you open the firewall for {x}, please?",
        "Somebody logged in from {x}!", "Last login: {x}", "My router ({x}) is dropping packets.",
    ),
    "url_credentials": (
        "{x} is what the cron job uses.", "Try it with {x}", "I copied {x} from the old config.",
        'The script prints "{x}" before it dies.', "Here is the link: {x}", "Clone ({x}) and run make.",
    ),
    "handle": (
        "{x} posted the pictures of the race.", "You find me as {x}", "Ask {x}, they wrote the patch.",
        'The winner is "{x}", congratulations.', "My profile: {x}", "Was that you ({x}) in the comments?",
    ),
}  # fmt: skip
_REPLIES: dict[str, tuple[str, ...]] = {
    "person": ("{x} has them, I am sure.", "ok, I will ask {x}", "No idea, but {x}, my old boss, would know.", "Danke, und Grüße an {x}!",
    "Tell {x}: the answer is still no.", "That was {x}'s idea, not mine."),
    "email": ("{x}, but I read it once a week at best.", "just write to {x}", "Try {x} instead, please.",
    "Schreib an {x}, das geht schneller.", "I only have <{x}> in my notes.", "Fine, forwarded from {x}."),
    "phone": ("{x}, ask for the kitchen.", "sure, I am on {x}", "Use {x}; the other one is dead.", "Ruf mich an: {x}",
    "That is my old one, {x} is better.", "Text ({x}), never call."),
    "address": ("{x}, second bell from the top.", "same as ever, {x}", "It went to {x} by mistake.", "Bring the bikes to {x}!",
    "Come to {x} whenever you like.", "Old flat: {x}, new one follows."),
    "iban": ("{x}, same as last year.", "send it to {x}", "I always use {x} for this.", "Bitte auf {x} überweisen.",
    "Wrong one. Take {x}, please.", "My account is {x}; thanks."),
    "card": ("{x}, but I would rather pay cash.", "take {x}", "Blocked {x} at once, of course.", "Put it on {x}, please.",
    "They still have {x}? Amazing.", "It was card {x}."),
    "national_id": ("{x}, and do not lose it this time.", "sure: {x}", "I wrote {x} on the back.", "They should have {x} since spring.",
    "Again? {x}!", "Copy it: {x}."),
    "account": ("{x}, says the letter.", "mine is {x}", "I gave them {x} and still waited an hour.", "Under {x}, I think.",
    "Tell them {x}; it helps.", "No luck with {x}."),
    "secret": ("{x} as always, please change it.", "use {x}", "Revoked. The new one: {x}", "I set {x} on the server last night.",
    "Oops, {x} was in the repo.", "Then try {x}, it worked for me."),
    "ip": ("{x} is mine, sorry.", "it is {x}", "Blocked {x} already.", "Move it to {x}, that one is free.", "I see only {x} in the log.",
    "Not me; {x} is the office."),
    "url_credentials": ("{x} still works here.", "take {x}", "I deleted {x} from the wiki.", "Set it to {x}, then redeploy.",
    "Works for me: {x}", "Not again, {x} was public?"),
    "handle": ("{x} is my better half.", "follow {x}", "I write as {x} over there.", "Ping {x}, not me.", "It is {x}; no relation.",
    "Only {x} liked it."),
}  # fmt: skip
# One line each, for any kind.
_SUBJECTS = ("Question about {x}", "{x} again", "Fwd: {x} and the move", "Re: {x}, please check", "Still open: {x}", 'About "{x}"')
_COMMITS = (
    "Remove {x} from the fixtures", "Stop logging {x}", "Revert hard-coded {x}", "{x}: drop from the sample config",
    'Replace "{x}" in the tests',
    "fix: crash reported with {x}", "Thanks to {x}: close files early", "docs: mention ({x}) only once",
)  # fmt: skip
_FILES = (
    "src/parser.py, tests/test_parser.py",
    "docs/usage.md",
    "lib/io/reader.c, lib/io/reader.h",
    "app/views/cart.html",
    "Makefile, setup.cfg",
    "pkg/server/route.go",
)

# Decoys with the sentences they stand in. Towns and products are none that an address or a name here contains.

_DECOYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "date": (("20N#-0N-1#", "1N.0N.202#", "March N, 201#", "0N/1#/202#", "2N November"), ("We agreed on {d}.",
    "It has been broken since {d}, more or less.")),
    "year": (("199#", "201#", "the 1970s"), ("That album is from {d}.", "Nothing like this happened in {d}.")),
    "time": (("1#:#5", "N:#0 am", "half past N", "N pm"), ("The train leaves at {d}.", "Dinner is at {d}, bring bread.")),
    "price": (("$N,#99.00", "€#9,90", "1N.50 EUR", "£N##", "N99 dollars", "CHF N#.-"), ("It costs {d}, which is a lot.",
    "I paid {d} for the whole box.")),
    "version": (("vN.1#.#", "3.1#.N", "N.#.0-rc1", "10.0.19045.3N##", "2.N"), ("Upgraded to {d} and nothing broke.",
    "The bug is gone in {d}.")),
    "path": (
        ("src/app/mainN.py", "/etc/nginx/nginx.conf", "docs/guide-N.md", "C:\\temp\\logN.txt", "../build/out.js",
        "/usr/local/lib/python3.1N"),
        ("The culprit is {d}, as usual.", "See {d} for the details."),
    ),
    "number": (("N,#00,000", "1N %", "N.## km", "19#0x1080", "5#2 MB", "2N °C", "N/5", "N out of 10", "#4N##", "RFC 2N16", "HTTP 404",
    "room N04"), ("I would say {d} is about right.", "They told us {d}, twice.")),
    "capitalised": (
        (
            "January", "August", "October", "Monday", "Thursday", "Sunday", "Lisbon", "Kyoto", "Reykjavik", "Scotland", "Nairobi",
            "Postgres", "Kubernetes", "Firefox",
            "Excel", "Bluetooth", "Windows", "Thanksgiving", "Ramadan", "Danish", "Bauhaus", "Photoshop", "Antarctica", "Wikipedia",
        ),
        ("I have been thinking of {d} all week.", "Honestly, {d} was not what I expected."),
    ),
}  # fmt: skip
_DECOYS_PER_PATTERN = 3
_PLAIN = (
    "The soup was cold but the bread made up for it.", "Nobody told me about the meeting.", "I left the umbrella on the bus.",
    "We should paint the fence before the rain comes.",
    "Sorry for the late answer, the week was long.", "The cat slept through all of it.", "It compiles now, do not ask why.",
    "See you soon, and bring a coat.", "The second half was much better than the first.",
    "Let me know if that works for you.", "My bike needs a new chain.", "Good point, I had not thought of that.",
)  # fmt: skip
_REVIEWS = (
    "The strap broke after a week but the light is bright.",
    "Good tea, terrible box, would buy again.",
    "Too loud for a kitchen and too small for a family.",
    "It does what it says and nothing more.",
)
_HELD_OUT = (
    ("Will the ferry run in that storm, do you think?", "doubt it, take the bridge"), ("Which of the two coats should I keep for winter?",
    "keep the green one, always"),
    ("Did the gardener come by about the hedge yet?", "not yet, maybe after the frost"),
    ("How was the choir, did they sing the long piece?", "they did and I cried a little"),
)  # fmt: skip


def _decoys(rng: random.Random, per_pattern: int) -> list[tuple[str, str, str]]:
    """Return decoys, each once, as kind, text and sentence, in random order."""
    found: dict[str, tuple[str, str, str]] = {}
    for kind, (patterns, sentences) in _DECOYS.items():
        for pattern in patterns:
            for _ in range(1 if kind == "capitalised" else per_pattern):
                text = pattern if kind == "capitalised" else _filled(rng, pattern)
                found[text] = (kind, text, rng.choice(sentences).replace("{d}", text))
    for length in (7, 40) * per_pattern * 2:
        text = token(rng, length, HEX)
        found[text] = ("hash", text, rng.choice(("It broke in commit {d}.", "Reverted {d}, sorry.")).replace("{d}", text))
    decoys = list(found.values())
    rng.shuffle(decoys)
    return decoys


def _filled(rng: random.Random, pattern: str) -> str:
    return pattern if "#" not in pattern and "N" not in pattern else fill(rng, pattern.replace("November", "\1")).replace("\1", "November")


def _values(rng: random.Random, per_kind: int) -> list[Value]:
    """Return as many values of every kind, its forms in turn; no value is part of another."""
    values, texts, cores = list[Value](), list[str](), set[str]()
    for forms in (name_tables(rng) | number_tables()).values():
        made, names = 0, list(forms)
        while made < per_kind:
            value = forms[names[made % len(names)]](rng)
            text, parts = value.text.casefold(), {core.casefold() for core in value.cores}
            if not parts & cores and not any(text in other or other in text for other in texts):
                values.append(value)
                texts.append(text)
                cores |= parts
                made += 1
    return values


class _Writer:
    """Writes the records, with sentences in turn so that each is used."""

    def __init__(self, rng: random.Random, decoys: Sequence[tuple[str, str, str]]) -> None:
        self._rng, self._left, self._turn = rng, list(decoys), 0
        self.records: list[Record] = []
        self.decoys: list[Decoy] = []

    def write(self, asked: Sequence[Value], answered: Sequence[Value], task: str) -> None:
        """Add a record whose input holds ``asked`` and whose output holds ``answered``."""
        name = f"{len(self.records):04d}"
        if task == "commit":
            files = [self._sentence(_COMMITS, value) for value in asked]
            sides = [
                "; ".join((self._rng.choice(_FILES), *files)),
                " and ".join(self._sentence(_COMMITS, v) for v in answered) or "Tidy up",
            ]
        else:
            sides = [self._text(name, [self._sentence(_MESSAGES[value.kind], value) for value in asked])]
            short = task == "subject"
            sentences = [self._sentence(_SUBJECTS if short else _REPLIES[value.kind], value) for value in answered]
            sides.append(" / ".join(sentences) or "A few news" if short else self._text(name, sentences))
        day = len(self.records)
        self.records.append(Record(name, f"2024-{day // 28 % 12 + 1:02d}-{day % 28 + 1:02d}T{day % 24:02d}:00:00", task, *sides))

    def rate(self, score: str) -> None:
        """Add a review with its score."""
        name = f"{len(self.records):04d}"
        self.records.append(Record(name, "2024-06-01", "rating", self._text(name, [self._rng.choice(_REVIEWS)]), score))
        self.decoys.append(Decoy("rating", score, name))

    def _sentence(self, sentences: Sequence[str], value: Value) -> str:
        self._turn += 1
        known = f"{value.label}{'' if value.label.endswith('=') else ' '}{value.text}" if value.label else value.text
        return sentences[self._turn % len(sentences)].replace("{x}", known)

    def _text(self, name: str, sentences: list[str]) -> str:
        """Join the sentences with one of a decoy, or a plain one where the decoys are used up."""
        if self._left:
            kind, text, sentence = self._left.pop()
            self.decoys.append(Decoy(kind, text, name))
        else:
            sentence = self._rng.choice(_PLAIN)
        sentences = [*sentences, sentence] if self._rng.random() < 0.5 else [sentence, *sentences]
        return " ".join(sentences)


def plant(seed: int, per_kind: int = PER_KIND) -> Planted:
    """Return a person's records with ``per_kind`` identifiers of every kind planted in them; the same for the same seed."""
    rng = random.Random(seed)
    values = _values(rng, per_kind)
    order = rng.sample(values, len(values))
    writer = _Writer(rng, _decoys(rng, _DECOYS_PER_PATTERN))
    for i, value in enumerate(order):
        asked, answered = ([value], []) if i % 2 else ([], [value])
        if i % TWICE == 0:
            asked, answered = [value], [value]
        if i % ACROSS == 0:
            (answered if i % 2 else asked).append(order[i - 1])
        writer.write(asked, answered, "subject" if i % 7 == 3 else "commit" if i % 7 == 5 else "reply")
        if i % 15 == 0:
            writer.rate(str(i // 15 % 5 + 1))
    held_out = tuple(Record(f"held-{i}", "2025-01-01", "reply", *sides) for i, sides in enumerate(_HELD_OUT))
    return Planted(tuple(writer.records), held_out, tuple(values), tuple(writer.decoys))
