"""How to reach somebody: e-mail addresses, phone numbers, handles, links that belong to one person, IP and MAC addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from cdcda_mobile.redaction.spans import DASHES, SPACES, Span, digits, found

_EMAIL = re.compile(
    r"(?<![\w.+-])\w[\w.+%'-]*@(?:[\w-]+\.)+[^\W\d_][\w-]*"
    r"|(?<![\w.+-])\w[\w.+-]*@(?:localhost\b|(?:\d{1,3}\.){3}\d{1,3})"
    # anna (at) example (dot) com
    r"|(?<![\w.+-])\w[\w.+-]*\s?[\[({<]\s?at\s?[\])}>]\s?[\w-]+(?:\s?(?:[\[({<]\s?(?:dot|punkt|point)\s?[\])}>]|\.)\s?[\w-]+)+"
    r"|(?<![\w.+-])\w[\w.+-]* at [\w-]+(?: dot [\w-]+)+",
    re.IGNORECASE,
)
_UPI = re.compile(r"(?<![\w.+-])[\w.-]{2,}@(?:ok\w+|ybl|paytm|upi|ibl|axl|apl|icici|sbi|hdfcbank)\b(?!\.\w)", re.IGNORECASE)

# Phones. Between two digits stands one separator, or an area code's parenthesis with what surrounds it.
_GAP = rf"(?:[{SPACES}./{DASHES}]|[{SPACES}]?[{DASHES}/][{SPACES}]|[{SPACES}]?\(\d{{1,5}}\)[{SPACES}{DASHES}]?)"
_EXTENSION = rf"(?:,?[{SPACES}]?(?:ext(?:ension)?\.?|x|durchwahl|poste)[{SPACES}]?\d{{1,6}})?(?!\d)"
_INTERNATIONAL = re.compile(rf"(?<![\w+])(?:\(\+\d{{1,3}}\)|\+[{SPACES}]?\d|00[1-9])(?:{_GAP}?\d){{5,14}}{_EXTENSION}", re.IGNORECASE)
_NATIONAL = re.compile(
    rf"(?<![A-Za-z\d_.,/+{DASHES}])(?:\(0\d{{1,5}}\)"
    rf"|0\d{{1,5}})(?:[{SPACES}]?[/{DASHES}.{SPACES}]?[{SPACES}]?\d{{2,8}}){{1,5}}{_EXTENSION}",
    re.IGNORECASE,
)
_GROUPED = re.compile(
    # 415-555-0132, (415) 555-0132, 1.415.555.0132, 98765 43210, 138 1234 5678, 8 (916) 123-45-67
    rf"(?<![A-Za-z\d_.{DASHES}/+])(?:"
    rf"(?:[18][{SPACES}.{DASHES}]?)?(?:\(\d{{2,5}}\)[{SPACES}{DASHES}]?"
    rf"|[2-9]\d\d[{SPACES}.{DASHES}/])\d{{3,5}}[{SPACES}.{DASHES}]\d{{2,5}}(?:[{SPACES}.{DASHES}]\d\d)?"
    rf"|(?:1[{SPACES}.{DASHES}])?[2-9]\d\d[.{DASHES}{SPACES}]\d{{3}}[.{DASHES}{SPACES}]\d{{4}}"
    rf"|8[{SPACES}{DASHES}]\d{{3}}[{SPACES}{DASHES}]\d{{3}}[{SPACES}{DASHES}]\d\d[{SPACES}{DASHES}]\d\d"
    rf"|[6-9]\d{{4}}[{SPACES}{DASHES}]\d{{5}}"
    rf"|1[3-9]\d[{SPACES}{DASHES}]?\d{{4}}[{SPACES}{DASHES}]?\d{{4}}"
    rf"|[2-9]\d\d[2-9]\d{{6}}|[6-9]\d{{9}}"
    rf"){_EXTENSION}(?![A-Za-z_]|{DASHES[:2]}\d)",
    re.IGNORECASE,
)
_CALLED = re.compile(
    rf"(?:\b(?:tel(?:e(?:phone|fon))?|t[eé]l(?:[eé]phone)?|(?:tele|mobile|cell|home|work|smart)?[ -]?phone|mobile|mobil|handy|cell|fax"
    rf"|portable|landline|"
    rf"whats-?app|signal|sms|(?:call|ring|dial|text|phone|reach|message)(?:ed|ing)?(?:[ ](?:me|us|him|her|them|back))?|rufnummer"
    rf"|anruf\w*|fon)\b|电话|手机|微信|传真)"
    rf"(?:[ ](?:number|nummer|no|nr|num|is|was|at|on|under|unter|me|us|back|her|him|them|to))*[.:#=)]{{0,2}}[{SPACES}：]{{0,2}}"
    rf"(?P<value>\(?\d(?:[{SPACES}./()·{DASHES}]{{0,2}}\d){{5,14}}){_EXTENSION}",
    re.IGNORECASE,
)
_DATE = re.compile(r"\d{1,2}[./-]\d{1,2}[./-](?:19|20)\d\d(?!\d)|(?:19|20)\d\d[./-]\d{1,2}[./-]\d{1,2}(?!\d)")

# Links.
_SENSITIVE = (
    r"(?:[\w-]*(?:token|key|secret|signature|password|passwd|credential|session|auth|jwt|invite|otp|reset)[\w-]*"
    r"|sig|pwd|pass|pw|sid|code|hash|user|username|uid|user_?id|email|mail|e|phone|name|account|customer|cid|ticket|login|member|state"
    r"|nonce)"
)
_LINK = re.compile(
    r"\b[a-z][a-z0-9+.-]{1,15}://[^\s/@\"'<>]*@[^\s\"'<>]+"  # with a name or a password before the host
    rf"|\bhttps?://[^\s\"'<>?#]+[?#](?:[^\s\"'<>]*[&;])?{_SENSITIVE}=[^\s\"'<>]+"
    r"|\bhttps?://[^\s\"'<>]+/~[\w.-]+[^\s\"'<>]*"
    r"|\bhttps?://(?:hooks\.slack\.com/services|(?:canary\.|ptb\.)?discord(?:app)?\.com/api/webhooks|api\.telegram\.org/bot"
    r"|outlook\.office\.com/webhook"
    r"|[\w-]+\.webhook\.office\.com)[^\s\"'<>]+"
    # whoever has one of these can open it
    r"|(?:\bhttps?://)?\b(?:docs\.google\.com/\w+|drive\.google\.com|(?:www\.)?dropbox\.com/(?:s|scl)|1drv\.ms"
    r"|(?:[\w-]+\.)?zoom\.us/(?:j|my|s)"
    r"|meet\.google\.com|teams\.microsoft\.com/l|we\.tl|[\w-]+\.sharepoint\.com|calendly\.com|chat\.whatsapp\.com|discord\.gg)/[^\s\"'<>]+",
    re.IGNORECASE,
)
_PROFILE = re.compile(
    r"(?:\bhttps?://)?(?<![\w.@-])(?:(?:www|m|mobile|[a-z]{2})\.)?"
    r"(?:(?:twitter|x|facebook|fb|instagram|threads|tiktok|pinterest|twitch|vk|last|patreon|ko-fi|venmo|behance|dribbble|flickr"
    r"|soundcloud|medium|letterboxd"
    r"|goodreads|keybase|quora|weibo|linktr|about|paypal|wa|t|youtube|buymeacoffee|gitlab|github|bitbucket)"
    r"\.(?:com|net|org|me|tv|io|ee|fm)"
    r"(?:/(?:@|u/|in/|user/|users/|channel/|c/|people/|profile/|profile\.php\?id=|add/)?(?!(?:search|hashtag|watch|explore|help|about"
    r"|login|home|settings|topics)\b)"
    r"[\w.%+-]*\w)/?(?![\w/])"
    r"|(?:linkedin\.com/(?:in|pub)|reddit\.com/u(?:ser)?|snapchat\.com/add|bsky\.app/profile|steamcommunity\.com/(?:id|profiles)"
    r"|stackoverflow\.com/users"
    r"|orcid\.org|xing\.com/profile|facebook\.com/(?:people|profile\.php)|keybase\.io|open\.spotify\.com/user|youtube\.com/(?:@|c/"
    r"|channel/|user/)"
    r"|tiktok\.com/@|medium\.com/@|cash\.app/\$|[\w-]+(?:\.[\w-]+)+/@)[\w./%@?=&+-]*\w)",
    re.IGNORECASE,
)
_OWN_SITE = re.compile(
    r"\b(?:my|our|his|her|personal)\s(?:\w+\s)?(?:site|website|homepage|home page|blog|portfolio|page|profile|web page)\s?(?:is|at|:|,"
    r"|\()?\s*(?:at\s)?"
    r"(?P<value>(?:https?://)?(?:[\w-]+\.)+[a-z]{2,}(?:/[^\s\"'<>)]*)?)",
    re.IGNORECASE,
)

# Handles.
_NO_HANDLE = frozenset(
    "param params return returns throws see since author version deprecated override property staticmethod classmethod dataclass "
    "pytest test media import "
    "charset keyframes types todo everyone here channel all nullable notnull inject autowired home work school noon midnight night "
    "latest next the a an "
    "least most experimental suppresswarnings component input output".split()
)
_AT = re.compile(r"(?<![\w/.@`+-])@(?P<name>[^\W\d](?:[\w.-]{0,38}\w)?|\d+\w*_\w+|\d+[^\W\d]{3,}\w*)(?:@[\w-]+(?:\.[\w-]+)+)?(?![\w/(])")
_REDDIT = re.compile(r"(?<![\w/-])/?u/[\w-]{3,20}\b")
_DISCORD = re.compile(
    r"(?<![\w#])(?!(?:issues?|pr|gh|bug|ticket|fix(?:e[sd])?|closes?d?|pull|mr|refs?|see|task|story|room|apt|unit"
    r"|suite)#)[\w.]{2,32}#\d{4}\b",
    re.I,
)
_MERGED = re.compile(r"\bMerge (?:pull|merge) request [#!]\d+ from (?P<name>[\w-]+)(?=[/:])")
_NO_VALUE = frozenset(
    "required missing invalid wrong empty null none not too taken now already needed optional unique correct incorrect broken blank "
    "always never a an the and or in on to "
    "is was set unset changed expired updated reset fixed valid used gone still only just field fields validation string nil "
    "undefined true false case here there with for "
    "from of by via at if when after before page form fix add remove update change handling handle check checks support test tests "
    "show hide use allow make".split()
)
_USER = re.compile(
    r"\b(?:(?P<mine>(?:my|his|her|your|their)\s(?:[\w-]+\s)?)?(?:user[ _-]?(?:name|id)?|login(?:[ _-]?(?:name|id))?|log-?in"
    r"|screen[ -]?name|handle|nick(?:name)?|gamertag"
    r"|benutzername|nutzername|identifiant|account[ _-]?name|(?:skype|wechat|weixin|telegram|discord|snapchat|snap|insta(?:gram)?"
    r"|twitter|tiktok|steam|psn|xbox"
    r"|line|kik|venmo|cash ?app|paypal|signal|github|gitlab|slack|mastodon|icq)(?:[ _-]?(?:id|user(?:name)?|handle|name|tag))?)|用户名)"
    r"[\"']?\s?(?P<link>[:=：]|\bis\b|\bwas\b)\s*[\"'`]?(?P<value>[$@]?(?:live:)?\w[\w.+#-]*\w)",
    re.IGNORECASE,
)

# Machines.
_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)")
_VERSIONED = re.compile(
    r"(?:\bv|\bversions?[ :=]*|\breleases?d?[ :]*|\bbump(?:s|ed)?\b[^!?\n]{0,60}|\bupgrade[sd]?\b[^!?\n]{0,60}|[=<>~^]=?\s?)$",
    re.IGNORECASE,
)
_MACHINE = re.compile(r"\b(?:ip|ips|ipv4|host|server|address|ping|ssh|dns|subnet|gateway|router|proxy|vpn)\b", re.IGNORECASE)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}(?:[0-9a-fA-F]{1,4}|(?<=::)|(?:\d{1,3}\.){3}\d{1,3})(?:%\w+)?(?!\w|:\S)")
_MAC = re.compile(
    r"(?<![\w:-])(?:(?:[0-9a-f]{2}:){5}[0-9a-f]{2}|(?:[0-9a-f]{2}-){5}[0-9a-f]{2}|[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4})(?![\w:-])",
    re.IGNORECASE,
)
_COORDINATES = re.compile(r"(?<![\d.])-?\d{1,2}\.\d{4,}°?\s?[NS]?[,;]?\s{0,2}-?\d{1,3}\.\d{4,}°?(?:\s?[EW]\b)?")


def contacts(text: str) -> Iterator[Span]:
    """Find e-mail addresses, phone numbers, personal links, handles, IP and MAC addresses, and coordinates."""
    yield from found(_EMAIL, text, "EMAIL")
    yield from found(_UPI, text, "ACCOUNT")
    yield from _phones(text)
    yield from (Span(s.start, s.start + len(text[s.start : s.end].rstrip(".,;:!?)]}*")), "URL") for s in found(_LINK, text, "URL"))
    yield from found(_PROFILE, text, "URL")
    yield from found(_OWN_SITE, text, "URL", "value")
    yield from found(_AT, text, "HANDLE", accept=lambda m: m["name"].casefold().split(".")[0] not in _NO_HANDLE)
    yield from found(_REDDIT, text, "HANDLE")
    yield from found(_DISCORD, text, "HANDLE")
    yield from found(_MERGED, text, "HANDLE", "name")
    yield from found(_USER, text, "HANDLE", "value", _is_user)
    yield from _machines(text)
    yield from found(_COORDINATES, text, "ADDRESS")


def _phones(text: str) -> Iterator[Span]:
    yield from found(_INTERNATIONAL, text, "PHONE", accept=lambda m: 7 <= len(digits(m[0].split("ext")[0])) <= 17)
    yield from found(_NATIONAL, text, "PHONE", accept=lambda m: len(digits(m[0])) >= 9 and not _DATE.match(m[0]))
    yield from found(_GROUPED, text, "PHONE", accept=lambda m: len(digits(m[0])) >= 8 and not _DATE.match(m[0]))
    yield from found(_CALLED, text, "PHONE", "value", lambda m: not _DATE.match(m["value"]))


def _is_user(match: re.Match[str]) -> bool:
    value = match["value"].casefold()
    if value in _NO_VALUE:
        return False
    return match["link"] in (":", "=", "：") or bool(match["mine"]) or not value.isalpha()


def _machines(text: str) -> Iterator[Span]:
    def is_address(match: re.Match[str]) -> bool:
        if match[0].startswith(("127.", "0.0.0.0", "255.")):
            return False  # of every machine
        before = text[max(0, match.start() - 60) : match.start()]
        return not _VERSIONED.search(before) or bool(_MACHINE.search(before))

    yield from found(_IPV4, text, "IP", accept=is_address)
    yield from found(_IPV6, text, "IP", accept=lambda m: _is_ipv6(m[0]))
    yield from found(_MAC, text, "MAC")


def _is_ipv6(value: str) -> bool:
    try:
        address = ipaddress.IPv6Address(value.partition("%")[0])
    except ValueError:
        return False
    # Names of classes, as in A::B, are valid addresses too.
    return not address.is_loopback and not address.is_unspecified and bool(digits(value))
