"""Redaction: what is hidden, what survives, that values come back and nothing else does, and that no request holds a planted value."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdcda_export.errors import ConfigError, MissingDependency
from cdcda_export.progress import Silent
from cdcda_mobile.augmentation.augment import planned
from cdcda_mobile.augmentation.held_out import HeldOut
from cdcda_mobile.augmentation.prompts import Planner
from cdcda_mobile.augmentation.select import Selector
from cdcda_mobile.augmentation.veil import Veil
from cdcda_mobile.config import RULE_NAMES, AugmentConfig, TeacherConfig
from cdcda_mobile.history import Record
from cdcda_mobile.redaction import Redactor, name_finder
from cdcda_mobile.redaction.library import PLAIN, SpacyNames, chosen_model
from cdcda_mobile.redaction.spans import Span
from fake_endpoint import Reply, chat, serving

# kind -> what stands in a text: the value after " | " where words around it are needed
HIDDEN = {
    "EMAIL": (
        "anna.schmidt@example.com",
        "o'brien+x@mail.co.uk",
        "müller@firma.de",
        "anna [at] example [dot] com",
        "anna at example dot com",
    ),
    "PHONE": (
        "+1 (415) 555-0132",
        "+14155550132",
        "415.555.0132",
        "(415) 555-0132 ext. 12",
        "call {} | 555-0132",
        "+44 (0)20 7946 0958",
        "07700 900123",
        "0049 30 1234567",
        "030/1234567",
        "089 / 123 456 78",
        "06.12.34.56.78",
        "0612345678",
        "+91 98765 43210",
        "9876543210",
        "138 1234 5678",
        "打电话{}给我 | 13812345678",
        "010-12345678",
        "(11) 91234-5678",
        "my mobile is {} | 9123 4567",
    ),
    "ADDRESS": (
        "bring the bikes to {}! | 31 The Crescent",
        "{}, São Paulo - SP, 05404-001 is where it is | Rua das Palmeiras, 181",
        "221B Baker Street, London NW1 6XE",
        "742 Evergreen Terrace, Springfield, IL 62704",
        "350 5th Ave, Apt 4B, New York, NY 10118",
        "12 bis avenue des Champs-Élysées, 75008 Paris",
        "Hauptstraße 12, 10115 Berlin",
        "Berliner Str. 5a, 80331 München",
        "Flat No. 12, Shanti Apartments, MG Road, Bengaluru 560001",
        "No. 88 Century Avenue, Pudong, Shanghai 200120",
        "我住在{} | 北京市海淀区中关村大街27号",
        "PO Box 4512, Denver, CO 80201",
        "Postfach 10 01 23",
        "he lives at {} now | 12 baker street",
    ),
    "BANK": (
        "Send it to {} and tell me | PL3923474294312623905872419",
        "DE89 3704 0044 0532 0130 00",
        "DE89370400440532013000",
        "FR14 2004 1010 0505 0001 3M02 606",
        "{} AND MORE | NL91 ABNA 0417 1643 00",
        "IBAN: {} | de89 3704 0044 0532 0130 00",
        "sort code {} | 20-00-00",
    ),
    "CARD": (
        "4111 1111 1111 1111",
        "4111111111111111",
        "3782-822463-10005",
        "take 2 {} ok | 5555 5555 5555 4444",
        "my card ending in {} | 4242",
    ),
    "ACCOUNT": (
        "078-05-1120",
        "my ssn is {} | 078051120",
        "account number {} | 12345678",
        "passport no. {} | C01X00T47",
        "Kundennummer {} | 19990815",
        "Kto.-Nr. {} | 1234567",
        "Kto 1234567, BLZ {} | 37040044",
        "customer no. {} | 4471-2290",
        "order #{} | 112-3456789-0123456",
        "QQ 12 34 56 C",
        "2345 6789 0123",
        "11010519491231002X",
        "transfer it to {} please | 31926819",
        "invoice {} | INV-20331",
    ),
    "SECRET": (
        "Revert hard-coded pw {} | Banane-427Leuchtturm",
        "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "xoxb-123456789012-AbCdEfGhIjKlMnOpQrStUvWx",
        "sk-proj-abcdEFGH1234ijklMNOP",
        "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w",
        "password: {} | swordfish",
        "token={} | 9f86d081884c7d65",
        'my password is "{}" | correct horse battery',
        "DB_PASSWORD={} | p@ssw0rd#1",
        "the password is {} | Tr0ub4dor&3",
        "PIN is {} | 4821",
        "Authorization: Bearer {} | mF_9.B5f-4.1JqM",
        "the key {} | 9f86d081884c7d659a2feaa0c55ad015",
        "密码:{} | qwe123456",
        "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END PRIVATE KEY-----",
        "here it is {} | kJ8sD3fLq9Zx2Vb7Nm4Tw1Yp",
    ),
    "IP": (
        "192.168.1.23",
        "thanks to {}: close early | 2001:db8::641d:2870",
        "ssh to {} | 10.0.0.5",
        "2001:db8::8a2e:370:7334",
        "fe80::1ff:fe23:4567:890a",
    ),
    "MAC": ("00:1B:44:11:3A:B7", "001b.4411.3ab7"),
    "URL": (
        "https://user:pass@host.example.com/x",
        "postgres://admin:hunter2@db.internal/prod",
        "https://example.com/reset?token=abc123def",
        "https://www.linkedin.com/in/anna-schmidt-42",
        "github.com/annaschmidt",
        "my blog is at {} | https://anna-writes.net/about",
    ),
    "HANDLE": ("@anna_schmidt92", "@anna@mastodon.social", "username: {} | jdoe42", "my username is {} | annas", "discord {} | anna#1234"),
    "WALLET": ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "0x742d35Cc6634C0532925a3b844Bc454e4438f44e"),
    "NAME": (
        "Dear {}, how are you | Anna",
        "met {} today | Elena Petrova",
        "saw Mr. {} there | Thornbury",
        "my sister {} came | Ljuba",
        "See you soon. Best regards, {} | Tomasz Kowalski",
        "my name is {} | Quentin Abernathy",
        "From: {} | Zadie Okafor",
    ),
}

SURVIVES = (
    "12 The Way We Were songs, 10 The Voice finalists",
    "4",
    "1 to 5",
    "[1]",
    "rated 4 out of 5 in 2019",
    "on 12/03/2024 at 10:30",
    "at 12:30:45 on 3.4.2021",
    "version 1.2.3",
    "upgrade to v2.10.0-rc1",
    "Bump foo from 1.2.3.4 to 1.2.3.5",
    "costs $1,234.56 or €99",
    "src/main/java/com/example/FooBar2Test.java",
    "1700000000",
    "Merge commit 9fceb02d0ae598e95dc970b74767f19372d61af8 into main",
    "fix abc1234",
    "Fix issue#1234 and PR#5678",
    "20240101123000_add_users.py",
    "use @property and @pytest.fixture in code",
    "actions/checkout@v3",
    "fix password: reset link",
    "auth token: fix refresh",
    "login is required",
    "the 2008 Wall Street crash",
    "10000 people marched in Paris",
    "Dear all, thanks for coming",
    "Hello World",
    "5 miles down the road",
    "A::B and std::vector",
    "127.0.0.1:8080 works",
    "see https://docs.python.org/3/library/re.html",
    "https://github.com/org/repo/issues/12",
    "from 2019 2020 2021 2022",
    "a member since 2019",
    "AbstractSingletonProxyFactoryBean2",
    "ISBN 978-3-16-148410-0",
    "arXiv:2508.21313",
    "[WIP] fix parser",
    "+1200 -4500 lines",
    "5 People At Florida Industrial Park",
    "Pin tensorflow-estimator==2.6.0",
    "press secretary said she expected it",
)


def record(text: str, output: str = "fine", task: str = "headline", name: str = "r") -> Record:
    return Record(name, "2024-01-01", task, text, output)


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in HIDDEN.items() for case in cases])
def test_hidden(kind: str, case: str) -> None:
    around, _, value = case.rpartition(" | ")
    text = f"in 2019 i wrote: {around or '{}'}".replace("{}", value)
    redactor = Redactor([record(text)])
    shown = redactor.redact(text)
    assert value not in shown
    # Nor does half of it stay beside a placeholder.
    rest = re.sub(r"\[[A-Z]+_\d+\]", " ", shown)
    assert not [word for word in re.findall(r"\w{4,}", value) if word in rest]
    assert f"[{kind}_1]" in shown
    assert redactor.restore(shown) == text


@pytest.mark.parametrize("text", SURVIVES)
def test_survives(text: str) -> None:
    assert Redactor([]).redact(text) == text


def test_a_value_has_one_placeholder_everywhere_and_every_time() -> None:
    records = [record("mail anna@example.org or bob@example.org"), record("bob@example.org is new", "from anna@example.org")]
    redactor = Redactor(records)
    assert [redactor.redact_record(r).input for r in records] == ["mail [EMAIL_1] or [EMAIL_2]", "[EMAIL_2] is new"]
    assert redactor.redact_record(records[1]).output == "from [EMAIL_1]"
    assert [Redactor(records).redact(r.input) for r in records] == [redactor.redact(r.input) for r in records]
    assert redactor.counts == {"EMAIL": 2}


def test_what_one_record_reveals_is_hidden_in_all() -> None:
    redactor = Redactor(
        [record("Dear Ljuba Novakova, come at ten"), record("the wifi password is blue77Falcon"), record("mail zdenka.hora@example.org")]
    )
    shown = redactor.redact("Novakova said blue77Falcon to Ljuba and Zdenka")
    assert redactor.redact("Zdenka came") == "Zdenka came"  # nobody wrote the word in the records
    assert "Novakova" not in shown and "Ljuba" not in shown and "blue77Falcon" not in shown
    assert Redactor([record("Dear Ljuba, hi")]).redact("met ljuba at the yard") == "met [NAME_2] at the yard"
    with_mail = Redactor([record("mail zdenka.hora@example.org"), record("Zdenka is late")])
    assert with_mail.redact("Zdenka came") == "[NAME_1] came"


def test_the_users_own_brackets_come_back_as_they_were() -> None:
    text = "[NAME_1] is a template, so is [EMAIL_2]; ask anna@example.org, Dear Ljuba"
    redactor = Redactor([record(text)])
    shown = redactor.redact(text)
    assert "[NAME_1] is" not in shown
    assert redactor.restore(shown) == text and redactor.unknown(shown) == []


def test_strange_placeholders_are_told() -> None:
    redactor = Redactor([record("mail anna@example.org [TICKET_9]")])
    assert redactor.unknown("write to [EMAIL_1] about [TICKET_9] and [1]") == []
    assert redactor.unknown("write to [EMAIL_7], [PHONE_1], [COMPANY_2], [NAME] and [Your Name]") == [
        "[EMAIL_7]", "[PHONE_1]", "[COMPANY_2]", "[NAME]", "[Your Name]",
    ]  # fmt: skip
    assert (
        redactor.restore(r"[email 1], \[EMAIL\_1\], EMAIL_1 and [EMAIL_7]") == "anna@example.org, " * 2 + "anna@example.org and [EMAIL_7]"
    )


def test_labels_and_scores_are_left() -> None:
    rated = record("Dear Ljuba, the strap smells", "2", "rating")
    assert Redactor([rated]).redact_record(rated) == record("Dear [NAME_1], the strap smells", "2", "rating")


def test_any_text_comes_back() -> None:
    chance = random.Random(5)
    pieces = [case.rpartition(" | ")[2] for cases in HIDDEN.values() for case in cases] + [
        "[NAME_1]",
        "NAME_2",
        "[",
        "]",
        '"',
        "\n",
        "é",
        "12",
        " ",
    ]
    for _ in range(40):
        text = "".join(chance.choice(pieces) + chance.choice([" ", ", ", "", "\n"]) for _ in range(12))
        redactor = Redactor([record(text)])
        assert redactor.restore(redactor.redact(text)) == text


def test_long_texts_take_no_time() -> None:
    for piece in ("1", "a.", "北京市海淀区", "12 Abc ", "password ", "Flat 1, "):
        Redactor([]).redact(piece * (6000 // len(piece)))  # an expression that backtracks would take minutes


def test_the_values_are_not_in_what_is_printed() -> None:
    assert "anna" not in repr(Redactor([record("anna@example.org")]))


def test_spacy_finds_names_that_no_rule_knows() -> None:
    text = "Yesterday Zhivko Petkov told Oluwaseun Adeyemi about it."
    finder = name_finder("")
    assert finder is not None and finder.label.startswith("spaCy")
    assert "Petkov" in Redactor([record(text)]).redact(text)
    shown = Redactor([record(text)], finder).redact(text)
    assert "Petkov" not in shown and shown.startswith("Yesterday [NAME_1]")


def test_a_text_too_long_for_spacy_is_read_in_pieces() -> None:
    class Short:
        """A pipeline that refuses long texts and takes every capitalised word for a person."""

        pipe_names, meta = ("ner",), {"lang": "en", "name": "short"}

        def pipe(self, texts: list[str], disable: list[str]) -> Iterator[Any]:
            for text in texts:
                assert len(text) <= 100_000
                people = [SimpleNamespace(start_char=m.start(), end_char=m.end(), label_="PERSON") for m in re.finditer(r"[A-Z]\w+", text)]
                yield SimpleNamespace(ents=people)

    text = "and then " * 30_000 + "Zhivko came, " + "x" * 150_000 + " with Oluwaseun"
    (spans, none, short) = SpacyNames(Short()).find([text, "", "Zhivko"])
    assert [text[span.start : span.end] for span in spans] == ["Zhivko", "Oluwaseun"]
    assert none == [] and short == [Span(0, 6, "NAME")]


def test_a_pipeline_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_finder(PLAIN) is None
    with pytest.raises(ConfigError, match="no spaCy pipeline 'xx_none'"):
        chosen_model("xx_none")
    with pytest.raises(ConfigError, match="--redact too"):
        AugmentConfig(redact_names=PLAIN)
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert chosen_model("") == PLAIN
    with pytest.raises(MissingDependency, match=r"pip install 'cdcda-mobile\[privacy\]'"):
        chosen_model("en_core_web_sm")


# The stage.

PLANTED = ("anna.kowalska@example.org", "+44 20 7946 0958", "Kowalska", "tulip77Anchor", "12 Quay Lane")


def planted_records(start: int, count: int) -> tuple[Record, ...]:
    made = []
    for n in range(start, start + count):
        chance = random.Random(n)
        words = " ".join(
            chance.choice("harbour kettle ledger lantern orchard saddle thimble whistle anchor barley".split()) + "aeiou"[n % 5]
            for _ in range(9)
        )
        text = f"Dear Anna Kowalska, {words} {PLANTED[n % 2]} and password: tulip77Anchor at 12 Quay Lane"
        made.append(Record(f"r{n:03d}", f"2024-{1 + n // 28:02d}-{1 + n % 28:02d}", "headline", text, f"{words[:30]} for Kowalska {n}"))
    return tuple(made)


def echo(body: dict[str, Any]) -> Reply:
    """Answer with invented words and a placeholder of the request, now and then with one that stands for nothing."""
    chance = random.Random(json.dumps(body["messages"]) + str(body["seed"]))
    said = re.findall(r"\[[A-Z]+_\d+\]", json.dumps(body["messages"]))
    invented = ["".join(chance.choice("bdfgklmnprst") + chance.choice("aeio") for _ in range(3)) for _ in range(12)]
    mark = "[EMAIL_99]" if chance.random() < 0.3 or not said else chance.choice(said)
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    if not {"input", "output"} & set(fields):  # the description of the person, which is asked for first
        return chat(json.dumps({name: ["writes short lines"] for name in fields}))
    texts = {"input": f"{' '.join(invented)} {mark}", "output": f"{' '.join(invented[::-3])} {mark}", "plain": " ".join(invented[:4])}
    return chat(json.dumps({name: texts[name] for name in fields}))


def test_no_request_holds_a_value_and_kept_records_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdcda_mobile.augmentation.augment import augment

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    progress, train, held_out = Silent(), planted_records(0, 20), planted_records(20, 4)
    with serving(echo) as endpoint:
        config, teacher = AugmentConfig(keep=8, redact=True, redact_names=PLAIN, without=["language"]), TeacherConfig(base_url=endpoint.url)
        paths = {"base_gguf": tmp_path / "no.gguf", "directory": tmp_path / "stage", "answers": tmp_path / "answers.jsonl"}
        result = augment(train, held_out, "7", config, teacher, seed=3, progress=progress, **paths)
    assert endpoint.requests
    for body in endpoint.requests:
        assert not [value for value in PLANTED if value in json.dumps(body, ensure_ascii=False)]
    kept = " ".join(f"{item.input} {item.output}" for item in result.kept)
    assert any(value in kept for value in PLANTED) and not re.search(r"\[[A-Z]+_\d+\]", kept)
    assert "a placeholder that stands for nothing" in {item.reason for item in result.rejected}
    assert result.metrics()["redacted"]["EMAIL"] == 1 and not [value for value in PLANTED if value in json.dumps(result.metrics())]
    assert not [value for value in PLANTED if value in (tmp_path / "answers.jsonl").read_text()]
    assert "Plain rules miss many names" in " ".join(progress.warnings)


def test_a_held_out_text_is_known_where_it_is_hidden_in_another_way() -> None:
    held_out = (Record("h", "2025-01-01", "headline", "The plumber will be here on Tuesday with Anna", "Pipes"),)
    quoting = Record("q", "2024-01-01", "headline", "Note: the plumber will be here on Tuesday with Anna Kowalska, bye", "Tuesday")
    train, config = (quoting, *planted_records(0, 6)), AugmentConfig(redact=True, redact_names=PLAIN)
    veil, sent = Veil(train, config, Silent()), list[str]()
    planner = planned(train, held_out, veil, config, 0, False, lambda request: sent.append(json.dumps(request.messages)) or "")
    sent += [json.dumps(planner.ask(k).request.messages) for k in range(20)]
    assert "whistle" in "".join(sent) and "plumber" not in "".join(sent)


def test_a_held_out_value_never_comes_back_through_a_placeholder() -> None:
    train, held_out = planted_records(0, 6), (Record("h", "2025-01-01", "headline", "Write to eve.held@example.org", "Post for eve"),)
    veil = Veil(train, AugmentConfig(redact=True, redact_names=PLAIN), Silent())
    hidden = veil.kept_out(held_out)[-1]
    (theirs,) = re.findall(r"\[EMAIL_\d+\]", hidden.input)
    shown = veil.shown(train)[0]
    (own,) = re.findall(r"\[EMAIL_\d+\]", shown.input)
    planner = Planner(veil.shown(train), HeldOut(veil.kept_out(held_out)), AugmentConfig(), 0, inputs_only=False)
    judge = veil.judge(Selector(train, held_out, AugmentConfig(without=[*RULE_NAMES])))
    asks = [ask for ask in map(planner.ask, range(8)) if ask.strategy == "new"]
    said = {mark: judge.judge(asks[0], json.dumps({"input": f"ask {mark}", "output": "now"})) for mark in (own, theirs)}
    assert said[own].input == "ask anna.kowalska@example.org"
    assert said[theirs].reason == "a placeholder that stands for nothing"
