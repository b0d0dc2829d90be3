"""What opens doors: keys of well-known shapes, passwords beside their names, private key blocks, strings that look random."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cdcda_mobile.redaction.spans import Span, found

_BLOCK = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)", re.DOTALL)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AIPA|ANPA|ANVA|AROA)[A-Z0-9]{12,}"  # AWS
    r"|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|gl[a-z]{2,6}-[\w-]{16,}"  # GitHub, GitLab
    r"|x(?:ox[a-z]|app)-[\w-]{8,}(?:\.[\w-]+)*"  # Slack
    r"|(?:sk|pk|rk)_(?:live|test)_\w{8,}|whsec_[\w+/=]{16,}"  # Stripe
    r"|sk-[\w-]{16,}"  # OpenAI, Anthropic, OpenRouter
    r"|AIza[\w-]{20,}|ya29\.[\w-]{16,}|GOCSPX-[\w-]{16,}|1//0[\w-]{20,}"  # Google
    r"|(?:hf|npm|gsk|r8|glsa|lin_api|dop_v1|doo_v1|shp[a-z]{2}|dckr_pat|pul|sbp|rubygems|fo1|tvly|pplx|nvapi|xai|key|fc|re|ntn|secret"
    r"|figd|phc|ATATT3|ATCTT3)[_-]"
    r"(?=[\w-]*\d)[A-Za-z0-9][\w=-]{19,}"
    r"|pypi-[\w-]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}|(?:AC|SK)[0-9a-f]{32}|sq0[a-z]{3}-[\w-]{20,}|EAA[A-Za-z0-9]{24,}|PMAK-[\w-]{20,}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}|hv[sbr]\.[\w-]{20,}|\d{8,10}:[\w-]{35}|[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,}"
    r"|eyJ[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*)?"  # JSON web tokens
    r"|(?:ssh-(?:rsa|ed25519|dss)|ecdsa-sha2-nistp\d+)\s[A-Za-z0-9+/=]{40,}(?:\s[\w.-]+@[\w.-]+)?"
    r")"
)
_HEADER = re.compile(
    r"\bAuthorization\s?[:=]\s?[\"']?(?:\w+\s)?(?P<header>[\w.~+/=:-]{6,})|\b(?:Bearer"
    r"|Basic)\s(?P<bearer>(?=[\w.~+/=-]*[\d=])[\w.~+/=-]{8,})"
    r"|\b(?:Cookie|Set-Cookie|X-[\w-]*(?:Key|Token))\s?:\s?(?P<cookie>[^\s;]{6,})",
    re.IGNORECASE,
)

_PASSWORD = (
    r"pass(?:word|wort|wd|phrase|code|key)s?|pwd?|pass|kennwort|mot de passe|mdp|contraseña|clave|senha|wachtwoord|parola|hasło|пароль"
    r"|密码|口令"
    r"|(?:recovery|backup|verification|access|security|door|gate|alarm|safe|lock|entry|unlock|2fa|otp|mfa|one-?time|login|activation"
    r"|sms)[ _-]?codes?|otp"
)
_KEY = (
    r"secret(?:[ _-]?(?:access)?[ _-]?key)?|api[ _-]?(?:key|token|secret)|(?:access|auth|encryption|signing|private|license|account"
    r"|shared|master|client|consumer|session|service|webhook|deploy|refresh"
    r"|bearer|id|csrf|bot|app)[ _-]?(?:access[ _-]?)?(?:key|token|secret)(?:[ _-]?id)?|token|credentials?|creds|connection[ _-]?string"
    r"|database[ _-]?url|dsn|cookie|session[ _-]?id|apikey"
    r"|key"
)
_IS = r"[\"'`)\]]{0,2}\s?(?:[:=：]|=>|:=|\bis\b|\bwas\b|\bist\b|\blautet\b|\best\b|\bes\b|是|为)(?:\s?(?:now|still|to)\b)?\s*"
_QUOTED = r"\"(?P<{0}double>[^\"\n]{{3,}})\"|'(?P<{0}single>[^'\n]{{3,}})'|`(?P<{0}tick>[^`\n]{{3,}})`|“(?P<{0}curly>[^”\n]{{3,}})”"
_PLAIN = r"(?P<{0}plain>[^\s\"'`“”,;<>]{{3,}}(?<![.!?)\]}}:]))"
_NAMED_PASSWORD = re.compile(
    rf"(?:(?<![A-Za-z])|(?-i:(?<=[a-z])(?=Pass)))(?:{_PASSWORD})(?P<link>{_IS})(?:{_QUOTED.format('')}|{_PLAIN.format('')})", re.IGNORECASE
)
_NAMED_KEY = re.compile(
    rf"(?:(?<![A-Za-z])|(?-i:(?<=[a-z])(?=Key|Token|Secret)))(?:{_KEY})(?P<link>{_IS})(?:{_QUOTED.format('')}|{_PLAIN.format('')})",
    re.IGNORECASE,
)
_FLAG = re.compile(
    r"(?<!\w)--?(?:password|passwd|pass|token|secret|api-?key|auth)[ =][\"']?(?P<value>[^\s\"'-][^\s\"']{2,})", re.IGNORECASE
)
_BESIDE = re.compile(
    rf"\b(?:{_PASSWORD}|{_KEY}|code)\s(?:of\s|to\s)?[\"'(“]?(?P<value>(?=\S*\d)[^\s\"'”,;]{{4,}}(?<![.!?)\]}}:,]))", re.IGNORECASE
)
_PIN = re.compile(r"\bpin(?:[ _-]?(?:code|number|no|nummer))?\b\W{0,3}(?:(?:is|was|ist)\s)?(?P<value>\d{4,8})\b", re.IGNORECASE)
_SEED = re.compile(
    r"\b(?:(?:seed|recovery|mnemonic|secret|backup)\s(?:phrase|words)|mnemonic|seed)\b\s?(?:is\b"
    r"|[:=])?\s*(?P<value>(?:[a-z]{3,8}\s){11,23}[a-z]{3,8})\b"
)
_GROUPED = re.compile(r"(?<![\w-])(?=[A-Z\d-]*\d)(?=[A-Z\d-]*[A-Z])[A-Z\d]{5}(?:-[A-Z\d]{5}){3,5}(?![\w-])")  # licence keys

_ORDINARY = frozenset(
    "required missing invalid wrong empty null none not too never always now already needed optional correct incorrect broken blank "
    "reset fix fixed add added remove removed "
    "update updated change changed expired the a an my your our their his her it its this that what with without and or for from in "
    "on to of by if when after before is was be "
    "been being set unset used valid revoked rotated stored saved lost leaked gone refresh handling handle check checks support test "
    "tests show hide use allow make string field "
    "undefined true false nil str int bool bytes optional[str] validation hash hashing hashed length strength protected secure safe "
    "weak strong same different short long "
    "something somewhere written under on off very so just only getting asking being going also still in: improve ensure prevent "
    "avoid".split()
)
_TOKEN = re.compile(r"(?<![\w+/=.-])[\w+/=-]{20,}(?!\.?\w)")
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F]+")
_HEXED = re.compile(r"(?<![\w./-])(?:[0-9a-f]{32,}|[0-9A-F]{32,})(?![\w-]|\.\w)")
_UUID = re.compile(r"(?<!\w)[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(?!\w)")
_HASH_WORD = re.compile(
    r"\b(?:commits?|sha-?\d*|hash(?:es)?|rev(?:ert(?:s|ed)?|isions?)?|cherry[ -]?pick(?:ed)?|merged?|git|md5|checksums?|digests?|tree"
    r"|blob|fixes|submodules?|update[sd]?|roll(?:ed|s)?|bump(?:ed|s)?"
    r"|sync(?:ed|s)?|upstream|head|branch|tag|patch|version|integrity|etag|file|see|since|introduced|broke|bisect\w*|regression"
    r"|changeset|backport\w*|build|into|pin(?:ned|s)?)\b[^!?\n]{0,48}$",
    re.IGNORECASE,
)
_KEY_WORD = re.compile(
    r"\b(?:(?:api|secret|access|private|auth|encryption|master)[ _-]?\w*|keys?|tokens?|secrets?|passw\w+|credentials?|bearer"
    r"|wallet)\b[^.!?\n]{0,32}$",
    re.IGNORECASE,
)


def credentials(text: str) -> Iterator[Span]:
    """Find keys, tokens, passwords and strings that look random; hashes of commits and files are left."""
    yield from found(_BLOCK, text, "SECRET")
    yield from found(_SHAPES, text, "SECRET")
    for name in ("header", "bearer", "cookie"):
        yield from found(_HEADER, text, "SECRET", name)
    for pattern, worth in ((_NAMED_PASSWORD, _is_password), (_NAMED_KEY, _is_key)):
        for name in ("double", "single", "tick", "curly"):
            yield from found(pattern, text, "SECRET", name, lambda m: m[m.lastgroup or 0].casefold() not in _ORDINARY)
        yield from found(pattern, text, "SECRET", "plain", worth)
    yield from found(_FLAG, text, "SECRET", "value")
    yield from found(_BESIDE, text, "SECRET", "value", lambda m: _is_mixed(m["value"]))
    yield from found(_PIN, text, "SECRET", "value")
    yield from found(_SEED, text, "SECRET", "value")
    yield from found(_GROUPED, text, "SECRET")
    yield from found(_HEXED, text, "SECRET", accept=_is_no_hash)
    yield from found(_UUID, text, "SECRET", accept=lambda m: _KEY_WORD.search(m.string[: m.start()]) is not None)
    yield from found(_TOKEN, text, "SECRET", accept=lambda m: looks_random(m[0]))


_MEASURE = re.compile(
    r"v?\d+(?:[.:/]\d+)+\w{0,4}|\d{1,3}|(?:19|20)\d\d|\d+(?:st|nd|rd|th|s|am|pm|px|ms|mb|gb|k|m)|[\w-]+(?:\.\w+)*\(.*|[#$€£]\S+",
    re.IGNORECASE,
)


def _is_password(match: re.Match[str]) -> bool:
    value = match["plain"].casefold()
    if value in _ORDINARY or value.startswith("["):
        return False
    spoken = match["link"].strip(" \"'`)]")[-1:].isalpha()  # "is" is followed by all sorts of words
    return not spoken or not value.isalpha() or not value.isascii()


def _is_key(match: re.Match[str]) -> bool:
    value = match["plain"]
    if value.casefold() in _ORDINARY or len(value) < 6:
        return False
    return (any(char.isdecimal() for char in value) and _is_mixed(value) and len(value) >= 8) or (len(value) >= 16 and looks_random(value))


def _is_mixed(value: str) -> bool:
    """Say whether a word is more than a word, a time, a date or a version."""
    return _MEASURE.fullmatch(value) is None


def _is_no_hash(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 80) : match.start()]
    if _KEY_WORD.search(before):
        return True
    return len(match[0]) not in (32, 40, 56, 64, 96, 128) or not _HASH_WORD.search(before)


def looks_random(token: str) -> bool:
    """Say whether a long string looks as if a generator wrote it: small, capital letters and digits that change places often.

    Hexadecimal strings are judged elsewhere. Names of files and classes change from capital to small once a word and have few digits.
    """
    if _HEX.fullmatch(token) or _UUID.search(token):
        return False
    solid = re.sub(r"[^A-Za-z0-9]", "", token)
    words = [part for part in re.split(r"[/_=+-]", token) if part]
    if len(solid) < 18:
        return False
    kinds = ["d" if char.isdecimal() else "u" if char.isupper() else "l" for char in solid]
    changes = sum(one != other for one, other in zip(kinds, kinds[1:], strict=False)) / (len(kinds) - 1)
    runs = sum(kind == "d" and (i == 0 or kinds[i - 1] != "d") for i, kind in enumerate(kinds))
    if max(map(len, words)) < 10 and len(words) > 3:
        return False  # words with hyphens, not a string that happens to hold one
    small = re.findall(r"[a-z]+", solid)
    if not runs:
        return (len(words) == 1 or "+" in token) and changes >= 0.38 and len("".join(small)) < 2.5 * len(small)
    mixed = len(set(kinds)) == 3
    vowels = sum(char in "aeiouAEIOU" for char in solid) / max(1, sum(char.isalpha() for char in solid))
    if mixed and changes >= 0.33 and vowels < 0.25:
        return True
    if len(words) == 1 and runs >= 2 and changes >= (0.33 if mixed else 0.1):
        return True
    return changes >= 0.33 and len("".join(small)) < 3 * len(small) if mixed else runs >= 4 and changes >= 0.3
