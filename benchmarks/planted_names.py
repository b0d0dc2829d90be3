"""Names and keys of made-up people: persons, e-mail addresses, secrets, network addresses, links."""

from __future__ import annotations

import random
from collections.abc import Callable

from planted_values import ALNUM, HEX, UPPER, Maker, Value, fill, made, token

# Persons: every name is given once, so that a name found in a request is that person's.

_PEOPLE = (
    "Rosalind Achterberg", "Tobias Kellermann", "Priya Raghunathan", "Declan Fitzwilliam", "Marguerite Delacroix", "Oluwaseun Adeyemi",
    "Hiroshi Takahashi", "Svetlana Morozova", "Esteban Villanueva", "Katarzyna Wróblewska", "José Luís Guimarães", "Łukasz Zieliński",
    "Søren Kristoffersen", "Zoë Vandenberghe", "Jürgen Großkopf", "Chiara Montefusco", "Tariq Mahmoudi", "Nguyen Thi Huong",
    "Bronwyn Llewellyn", "Anthony Pemberton", "Deborah Whitlock", "Gregory Sandoval", "Felicity Harcourt", "Malcolm Okonkwo",
    "Ingrid Haugland", "Rajesh Venkataraman", "Fatima Benchekroun", "Dmitri Sokolovsky", "Beatrix Oosterhuis", "Cormac Gallagher",
    "Yolanda Figueroa", "Leopold Steinhauer", "Philippa Ravenscroft", "Ayesha Siddiqui", "Emilio Castellanos", "Gwendolyn Thackeray",
    "Matthias Brandstetter", "Xiulan Ouyang", "Kwabena Asante", "Ottilie Schwarzenbach",
)  # fmt: skip
_FIRST_ONLY = ("Thaddeus", "Annelise", "Kareem", "Siobhan", "Wolfgang", "Lakshmi", "Bartholomew", "Ximena")
_SPECIAL = {
    "hyphenated": ("Jean-Baptiste Lefèvre-Pontalis", "Anne-Sophie Hall-Kowalski", "Karl-Heinz Ritter-Vogt"),
    "apostrophe": ("Niamh O'Sullivan", "Giulia D'Alessandro", "Sinéad O’Rourke"),
    "particle": ("Willem van der Meulen", "Ana de la Fuente", "Friedrich von Hohenfels"),
    "initials": ("J. R. Abernathy", "T.K. Balasubramanian", "P. Waddington"),
    "cjk": ("山田太郎", "王秀英", "佐藤花子"),
    "cyrillic": ("Наталья Кузнецова", "Сергей Лебедев", "Ольга Тарасова"),
}
_PARTICLES = {"van", "der", "de", "la", "von", "dr", "mr", "ms", "prof"}


def _name_parts(text: str) -> tuple[str, ...]:
    parts = [part.strip(".,") for part in text.split()]
    return tuple(part for part in parts if part.casefold() not in _PARTICLES and (len(part) > 2 or not part.isascii()) and "." not in part)


class People:
    """Gives every made-up person once, in a form of its turn."""

    def __init__(self, rng: random.Random) -> None:
        self._full, self._first = rng.sample(_PEOPLE, len(_PEOPLE)), rng.sample(_FIRST_ONLY, len(_FIRST_ONLY))
        self._special = {form: list(names) for form, names in _SPECIAL.items()}

    def forms(self) -> dict[str, Maker]:
        """Return how persons are written."""
        plain: dict[str, Callable[[str, str], str]] = {
            "first-last": lambda first, last: f"{first} {last}",
            "title": lambda first, last: f"Dr. {first} {last}",
            "middle-initial": lambda first, last: f"{first} M. {last}",
            "last-first": lambda first, last: f"{last}, {first}",
            "title-last": lambda first, last: f"Ms. {last}",
            "capitals": lambda first, last: f"{first} {last}".upper(),
            "lower-case": lambda first, last: f"{first} {last}".lower(),
        }
        forms: dict[str, Maker] = {form: self._plain(form, write) for form, write in plain.items()}
        forms["first-only"] = lambda rng: self._value("first-only", self._first.pop())
        for form, names in self._special.items():
            forms[form] = self._given(form, names)
        return forms

    def _plain(self, form: str, write: Callable[[str, str], str]) -> Maker:
        def make(rng: random.Random) -> Value:
            first, last = self._full.pop().rsplit(" ", 1)
            return self._value(form, write(first, last))

        return make

    def _given(self, form: str, names: list[str]) -> Maker:
        return lambda rng: self._value(form, names.pop())

    @staticmethod
    def _value(form: str, text: str) -> Value:
        return Value("person", form, text, _name_parts(text))


# E-mail addresses.

_LOCAL = ("m.thornbury", "petra.lindqvist", "kaplan_omer", "dvoraková", "hugo.b.sterling", "aileen-mc", "ravi.s.1987", "zsofia.kiss",
"lucas77b",
          "contact.brigitte", "tdelgado", "wren_hollis", "nadia.el.fassi", "bo.ekstrom")  # fmt: skip
_HOSTS = (
    "gmail.com",
    "outlook.com",
    "posteo.de",
    "orange.fr",
    "proton.me",
    "btinternet.com",
    "yahoo.co.uk",
    "mail.bigcorp.io",
    "uni-example.ac.at",
)


def _email(form: str, shape: Callable[[str, str], str]) -> Maker:
    def make(rng: random.Random) -> Value:
        local = rng.choice(_LOCAL).replace("á", "a") + fill(rng, rng.choice(("#", "##", "N###")))
        text = shape(local, rng.choice(_HOSTS))
        return Value("email", form, text, (local,))

    return make


_EMAILS = {
    "plain": _email("plain", lambda local, host: f"{local}@{host}"),
    "plus-tag": _email("plus-tag", lambda local, host: f"{local}+news@{host}"),
    "capitals": _email("capitals", lambda local, host: f"{local.title()}@{host.title()}"),
    "subdomain": _email("subdomain", lambda local, host: f"{local}@mx.team.{host}"),
    "mailto": _email("mailto", lambda local, host: f"mailto:{local}@{host}"),
    "angle": _email("angle", lambda local, host: f"<{local}@{host}>"),
    "umlaut": _email("umlaut", lambda local, host: f"jörg.{local}@müller-{host}"),
    "spelled-out": _email("spelled-out", lambda local, host: f"{local} (at) {host}"),
}


# Secrets, network addresses, links.

_WORDS = ("Sommer", "Bicycle", "hunter", "Lighthouse", "monkey", "Ananas", "Dragonfly", "correct", "horse", "staple", "Winter", "tuesday")


def _secret(form: str, label: str, write: Callable[[random.Random], str]) -> Maker:
    return made("secret", form, label, write, numeric=False)


_SECRETS = {
    "openai": _secret("openai", "OpenAI key", lambda r: "sk-proj-" + token(r, 48)),
    "openai-old": _secret("openai-old", "API key", lambda r: "sk-" + token(r, 48)),
    "anthropic": _secret("anthropic", "key", lambda r: "sk-ant-api03-" + token(r, 60, ALNUM + "-_")),
    "aws-id": _secret("aws-id", "AWS key", lambda r: "AKIA" + token(r, 16, UPPER + "234567")),
    "aws-secret": _secret("aws-secret", "aws_secret_access_key =", lambda r: token(r, 40, ALNUM + "+/")),
    "github": _secret("github", "GitHub token", lambda r: "ghp_" + token(r, 36)),
    "github-fine": _secret("github-fine", "PAT", lambda r: "github_pat_" + token(r, 22) + "_" + token(r, 40)),
    "gitlab": _secret("gitlab", "GitLab token", lambda r: "glpat-" + token(r, 20)),
    "slack": _secret("slack", "Slack token", lambda r: f"xoxb-{fill(r, 'N###########')}-{token(r, 24)}"),
    "stripe": _secret("stripe", "Stripe key", lambda r: "sk_live_" + token(r, 24)),
    "google": _secret("google", "Maps key", lambda r: "AIza" + token(r, 35, ALNUM + "-_")),
    "hugging-face": _secret("hugging-face", "token", lambda r: "hf_" + token(r, 34)),
    "npm": _secret("npm", "npm token", lambda r: "npm_" + token(r, 36)),
    "sendgrid": _secret("sendgrid", "SendGrid key", lambda r: f"SG.{token(r, 22)}.{token(r, 43)}"),
    "telegram-bot": _secret("telegram-bot", "bot token", lambda r: f"{fill(r, 'N#########')}:AA{token(r, 33)}"),
    "jwt": _secret("jwt", "Bearer", lambda r: f"eyJhbGciOiJIUzI1NiJ9.eyJ{token(r, 40)}.{token(r, 43)}"),
    "hex-key": _secret("hex-key", "api_key:", lambda r: token(r, 32, HEX)),
    "uuid-key": _secret("uuid-key", "client secret:", lambda r: "-".join(token(r, n, HEX) for n in (8, 4, 4, 4, 12))),
    "password-colon": _secret("password-colon", "password:", lambda r: r.choice(_WORDS) + fill(r, "20##") + r.choice("!?#$")),
    "password-is": _secret(
        "password-is", "wifi password is", lambda r: r.choice(_WORDS).lower() + fill(r, "####") + r.choice(_WORDS).lower()
    ),
    "password-random": _secret("password-random", "root password", lambda r: token(r, 12, ALNUM + "!%&*#")),
    "password-env": _secret("password-env", "DB_PASSWORD=", lambda r: token(r, 10) + "$" + token(r, 3)),
    "pw": _secret("pw", "pw", lambda r: r.choice(_WORDS) + "-" + fill(r, "###") + r.choice(_WORDS)),
    "passwort": _secret("passwort", "Passwort:", lambda r: r.choice(_WORDS) + "_" + fill(r, "###") + "xY"),
}


def _ip(form: str, write: Callable[[random.Random], tuple[str, str]]) -> Maker:
    def make(rng: random.Random) -> Value:
        text, core = write(rng)
        return Value("ip", form, text, (core,))

    return make


def _v4(rng: random.Random, pattern: str) -> str:
    return ".".join(str(rng.randint(11, 250)) if part == "*" else part for part in pattern.split("."))


def _v6(rng: random.Random, groups: int) -> str:
    return ":".join(token(rng, 4, HEX).lstrip("0") or "1" for _ in range(groups))


_IPS = {
    "v4-public": _ip("v4-public", lambda r: (t := _v4(r, "203.0.113.*"), t)),
    "v4-private": _ip("v4-private", lambda r: (t := _v4(r, "192.168.*.*"), t)),
    "v4-ten": _ip("v4-ten", lambda r: (t := _v4(r, "10.*.*.*"), t)),
    "v4-port": _ip("v4-port", lambda r: ((t := _v4(r, "198.51.100.*")) + ":8080", t)),
    "v4-cidr": _ip("v4-cidr", lambda r: ((t := _v4(r, "172.16.*.*")) + "/24", t)),
    "v4-url": _ip("v4-url", lambda r: ("http://" + (t := _v4(r, "85.*.*.*")) + "/status", t)),
    "v6-full": _ip("v6-full", lambda r: (t := "2001:0db8:" + _v6(r, 6), t)),
    "v6-short": _ip("v6-short", lambda r: (t := f"2001:db8::{_v6(r, 2)}", t)),
    "v6-link": _ip("v6-link", lambda r: (t := f"fe80::{_v6(r, 4)}", t)),
    "v6-port": _ip("v6-port", lambda r: ("[" + (t := f"2a02:{_v6(r, 2)}::{_v6(r, 1)}") + "]:443", t)),
    "v6-capitals": _ip("v6-capitals", lambda r: (t := f"2001:DB8::{_v6(r, 3)}".upper(), t)),
}


def _link(kind: str, form: str, pattern: str) -> Maker:
    """``{}`` stands for the part that gives it away."""

    def make(rng: random.Random) -> Value:
        core = (
            token(rng, 11)
            if kind == "url_credentials"
            else rng.choice(("lena", "kofi", "mirko", "tess", "yuki")) + "_" + token(rng, 5).lower()
        )
        return Value(kind, form, pattern.format(core), (core,))

    return make


_LINKS = {
    "https-basic": "https://deploy:{}@git.example.com/team/app.git", "postgres": "postgresql://app:{}@db.example.net:5432/prod",
    "mysql": "mysql://root:{}@10-0-0-4.example/shop",
    "mongodb": "mongodb+srv://svc:{}@cluster0.example.mongodb.net/main", "redis": "redis://:{}@cache.example.org:6379/0",
    "ftp": "ftp://anna:{}@files.example.com/out",
    "query-token": "https://api.example.com/v2/export?token={}&page=3", "query-key": "https://hooks.example.com/run?api_key={}",
    "amqp": "amqps://worker:{}@mq.example.com/jobs",
    "magic-link": "https://example.com/reset-password?code={}", "sas": "https://blob.example.net/x.csv?sv=2023-01-03&sig={}",
    "smtp": "smtp://mailer:{}@mail.example.com:587",
}  # fmt: skip
_HANDLES = {
    "at": "@{}", "github": "https://github.com/{}", "github-bare": "github.com/{}", "twitter": "https://twitter.com/{}",
    "linkedin": "https://www.linkedin.com/in/{}",
    "instagram": "instagram.com/{}", "telegram": "t.me/{}", "mastodon": "@{}@mastodon.social", "reddit": "u/{}",
    "facebook": "https://facebook.com/{}",
    "tiktok": "https://www.tiktok.com/@{}", "tilde": "https://people.example.edu/~{}",
}  # fmt: skip


def name_tables(rng: random.Random) -> dict[str, dict[str, Maker]]:
    """Return the kinds of this module with their forms; persons are dealt anew."""
    return {
        "person": People(rng).forms(),
        "email": _EMAILS,
        "secret": _SECRETS,
        "ip": _IPS,
        "url_credentials": {form: _link("url_credentials", form, pattern) for form, pattern in _LINKS.items()},
        "handle": {form: _link("handle", form, pattern) for form, pattern in _HANDLES.items()},
    }
