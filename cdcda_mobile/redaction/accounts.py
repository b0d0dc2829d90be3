"""Numbers that stand for a person or their money: bank accounts, cards, national and customer ids, wallets."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cdcda_mobile.redaction.spans import DASHES, SPACES, Span, digits, found

_S = rf"[{SPACES}.{DASHES}]"  # what may separate groups of digits

# Characters of an IBAN by country (the SWIFT registry, ISO 13616).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ DZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST",
        26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE",
        31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_IBAN = re.compile(rf"(?<![A-Za-z0-9])(?=(?P<value>[A-Z]{{2}}{_S}?\d{{2}}(?:{_S}?[A-Z0-9]){{11,36}}))", re.IGNORECASE)
# A country and nothing but digits, too few or too many of them: somebody's typing error, and little else looks so.
_MISTYPED_IBAN = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_IBAN_LENGTHS)})\d{{14,32}}(?![A-Za-z0-9])")
_BANK_WORD = re.compile(r"\b(?:iban|bank|account|konto|compte|cuenta)\b[^.!?]{0,30}$", re.IGNORECASE)
_BIC = re.compile(r"\b(?:BIC|SWIFT)(?:[/ ](?:BIC|SWIFT|code|Code))*\s?[:=]?\s?(?P<value>[A-Z]{4}[A-Z]{2}[A-Z0-9]{2}(?:[A-Z0-9]{3})?)\b")
_SORT_CODE = re.compile(
    rf"\b(?:sort[ -]?code|s/c|sort)\W{{0,3}}(?:is\s|no\W{{0,2}})?(?P<value>\d\d{_S}?\d\d{_S}?\d\d)(?!\d)"
    rf"|(?P<both>(?<!\d)\d\d-\d\d-\d\d[ ,/]{{1,2}}\d{{8}})(?!\d)",
    re.IGNORECASE,
)

# Cards by their groups, at every place: two numbers side by side must not hide the second.
_CARD = re.compile(
    rf"(?<!\d)(?=(?P<value>\d{{13,19}}|\d{{4}}{_S}{{1,2}}\d{{4}}{_S}{{1,2}}\d{{4}}{_S}{{1,2}}\d{{1,4}}(?:{_S}\d{{3}})?"
    rf"|\d{{4}}{_S}\d{{6}}{_S}\d{{4,5}}"
    rf"|\d{{4}}{_S}\d{{3}}{_S}\d{{3}}{_S}\d{{3}}|\d{{6}}{_S}\d{{7,13}})(?!\d))"
)
_ISSUER = re.compile(r"4|5|6|3[0145678]|2[2-7]")
_CARD_TAIL = re.compile(
    r"\b(?:card|visa|master-?card|amex|karte|carte|tarjeta|account|konto)\b[^.!?\d]{0,30}\b(?:ending|ends|endend|last (?:four"
    r"|4)(?: digits)?)\W{0,3}(?:in|with|on|are|is|auf)?\W{0,3}(?P<tail>\d{4})\b"
    r"|(?:[*xX•]{4}[ -]?){1,3}(?P<masked>\d{4})\b"
    r"|\b(?:cvv2?|cvc2?|csc|security code|prüfziffer)\W{0,3}(?:is\s|code\s)?(?P<cvv>\d{3,4})\b",
    re.IGNORECASE,
)

# Words before a number that make it somebody's. The first row is enough for any long number near it.
_STRONG = (
    r"accounts?|acct|a/c|routing|aba|iban|bank|ssn|social security|national insurance|passport|passeport|reisepass|pasaporte"
    r"|passaporto|driver'?s?|driving"
    r"|identity|id card|tax(?:payer)?|steuer(?:[ -]?(?:id|nummer))?|tin|ein|itin|vat|nino?|ni|nhs|nhi|medicare|medicaid|insurance"
    r"|sozialversicherung\w*|versicherung\w*"
    r"|personalausweis\w*|ausweis\w*|konto\w*|kto|blz|bankleitzahl"
    r"|kundennummer|kunden[ -]?(?:nr|nummer|id)|mitglied\w*|compte|s[ée]curit[ée] sociale"
    r"|cuenta|aadhaar|aadhar|pan|uan|gstin|voter|epic|sin|tfn|abn"
    r"|cpf|cnpj|rfc|curp|dni|nie|nif|bsn|pesel|imei|imsi|iccid|vin|customer|client|member(?:ship)?|subscriber|policy(?:holder)?"
    r"|patient|mrn|medical record|health card"
    r"|student|matriculation|matrikel\w*|employee|staff|payroll|badge|loyalty|frequent[ -]?flyer|miles|library card|licen[cs]e"
    r"|licence plate|number plate"
    r"|kennzeichen|visa|green card|alien|permit|beneficiary|credit|debit|card|giro|paypal|upi|loan|mortgage|meter|id"
)
_WEAK = (
    r"order|invoice|tracking|shipment|parcel|booking|reservation|confirmation|reference|ref|pnr|record locator|case|claim|file|serial"
    r"|registration|reg|application|auftrag\w*"
    r"|rechnung\w*|bestell\w*|sendung\w*|commande|facture|user|contract|vertrag\w*|docket|transaction|transfer|receipt"
)
_LINK = (
    r"(?:\W{0,3}\b(?:number|numbers|no|nr|num|nummer|numéro|número|code|card|ids?|plate|is|was|ist|lautet|est|es|with|account)\b\.?"
    r"|[ ]?[#:=№°º])"
)
_VALUE = (
    rf"(?:[A-Z]{{0,5}}[{DASHES}/]?"
    rf"|(?-i:[A-Z]{{1,5}} ))\d[A-Z\d]*(?:[{SPACES}./{DASHES}]?[A-Z]{{0,3}}\d[A-Z\d]*)*(?:[{DASHES} ]?[A-Z]\b)?"
    rf"|[A-Z]{{1,6}}\d[A-Z\d]{{2,}}"
)
_NAMED = re.compile(rf"\b(?:{_STRONG}|{_WEAK})(?P<link>{_LINK}{{1,4}})\W{{0,3}}(?P<value>{_VALUE}|[A-Z\d]{{6}}\b)", re.IGNORECASE)
_DIRECT = re.compile(rf"\b(?:(?P<strong>{_STRONG})|{_WEAK})[{SPACES}]{{1,2}}\(?(?P<value>{_VALUE})", re.IGNORECASE)
_NEAR = re.compile(rf"(?<![\w.,$€£¥#/-])(?P<value>\d(?:[{SPACES}{DASHES}]?\d){{6,}})(?![\w,%]|\.\d)")
_NEAR_WORD = re.compile(rf"\b(?:{_STRONG}|wire|pay|transfer|überweis\w*)\b[^.!?]{{0,48}}$", re.IGNORECASE)
_NEAR_AFTER = re.compile(
    r"^[\"')]?\s(?:is|was)\s(?:my|his|her|our|their|the|your)\s[^.!?]{0,24}\b(?:account|number|id|passport|card|ssn)\b", re.IGNORECASE
)
_ASIAN = re.compile(
    r"(?:身份证|护照|账号|帐号|账户|卡号|银行卡|社保|驾照|车牌|工号|学号|订单)[号码]{0,2}(?:是"
    r"|为)?[:： ]?(?P<value>[\u4e00-\u9fffA-Z]?[A-Z]?[\dA-Z][\dA-Z -]{3,}[\dXA-Z])"
)
_DATED = re.compile(
    r"(?:19|20)\d\d(?:[./-]\d{1,2}){1,2}$|\d{1,2}[./-]\d{1,2}[./-](?:19|20)?\d\d$|(?:19|20)\d\d$|(?:19|20)\d\d(?:0[1-9]"
    r"|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}|\d{6})?$|\d{1,2}\.\d{1,3}(?:\.\d{1,3})?$|\d{1,2}/\d{1,2}$"
)

# Ids that their shape alone gives away.
_SHAPES = re.compile(
    r"(?<![\w.-])(?:"
    rf"\d{{3}}[{DASHES} .]\d{{2}}[{DASHES} .]\d{{4}}"  # US SSN and ITIN
    rf"|[A-Z]{{2}}[{SPACES}-]?\d\d[{SPACES}-]?\d\d[{SPACES}-]?\d\d[{SPACES}-]?[A-D]"  # UK national insurance
    r"|[A-Z9]{5}\d{6}[A-Z9]{2}\d[A-Z]{2}"  # UK driving licence
    r"|\d{2}-\d{7}"  # US EIN
    r"|[A-Z]{5}\d{4}[A-Z]"  # Indian PAN
    r"|\d{2}[A-Z]{5}\d{4}[A-Z][A-Z\d]Z[A-Z\d]"  # Indian GSTIN
    r"|[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]"  # Chinese resident id
    rf"|[12][{SPACES}]?\d\d[{SPACES}]?(?:0[1-9]|1[0-2]|[2-9]\d)[{SPACES}]?(?:\d\d"
    rf"|2[AB])[{SPACES}]?\d{{3}}[{SPACES}]?\d{{3}}(?:[{SPACES}]?/?[{SPACES}]?\d\d)?"  # French INSEE
    r"|[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]"  # Italian codice fiscale
    r"|\d{8}-?[A-HJ-NP-TV-Z]|[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z]"  # Spanish DNI, NIE
    r"|[STFGM]\d{7}[A-Z]"  # Singapore
    r"|\d{6}-[1-4]\d{6}"  # Korea
    r"|\d{3}\.\d{3}\.\d{3}-\d\d|\d{2}\.\d{3}\.\d{3}/\d{4}-\d\d"  # Brazil
    r"|(?:19|20)?\d{6}[-+]\d{4}"  # Sweden
    r"|756\.\d{4}\.\d{4}\.\d\d"  # Switzerland
    r"|\d\d[0-3]\d[01]\d\d\d[A-Z]\d{3}"  # German Sozialversicherung
    r"|\d\d \d{6} [A-Z] \d{3}"
    r"|(?:DE|GB|FR|IT|ES|AT|NL|BE|PL|SE)U?[ ]?\d{8,12}(?:B\d\d)?"  # European VAT
    r")(?![\w-])"
)
_AADHAAR = re.compile(rf"(?<!\d)(?<!\d[{SPACES}{DASHES}])[2-9]\d{{3}}([{SPACES}{DASHES}])\d{{4}}\1\d{{4}}(?![{SPACES}{DASHES}]?\d)")
_VIN = re.compile(r"\b(?=[A-Z\d]*\d)(?=[A-Z\d]*[A-Z]{2})[A-HJ-NPR-Z\d]{11}\d{6}\b")

_WALLET = re.compile(
    r"(?<!\w)(?:0x[0-9a-fA-F]{40}|(?:bc1|tb1|ltc1|addr1)[a-z0-9]{25,100}|[48][0-9AB][1-9A-HJ-NP-Za-km-z]{93}"
    r"|T(?=[A-Za-z]*\d)[1-9A-HJ-NP-Za-km-z]{33}"
    r"|(?=[1-9A-HJ-NP-Za-km-z]*\d[1-9A-HJ-NP-Za-km-z]*[A-Z])(?=[1-9A-HJ-NP-Za-km-z]*[a-z])(?:[13LMD]|r)[1-9A-HJ-NP-Za-km-z]{25,34})(?!\w)"
)


def accounts(text: str) -> Iterator[Span]:
    """Find bank accounts, payment cards, national, customer and other account numbers, and cryptocurrency wallets."""
    yield from _ibans(text)
    yield from found(_MISTYPED_IBAN, text, "BANK")
    yield from found(_BIC, text, "BANK", "value")
    yield from found(_SORT_CODE, text, "BANK", "value")
    yield from found(_SORT_CODE, text, "BANK", "both")
    yield from found(_CARD, text, "CARD", "value", _is_card)
    for name in ("tail", "masked", "cvv"):
        yield from found(_CARD_TAIL, text, "CARD", name)
    yield from found(_NAMED, text, "ACCOUNT", "value", _is_number)
    yield from found(_DIRECT, text, "ACCOUNT", "value", _is_plain_number)
    yield from found(_NEAR, text, "ACCOUNT", "value", _is_near)
    yield from found(_ASIAN, text, "ACCOUNT", "value")
    yield from found(_SHAPES, text, "ACCOUNT", accept=lambda m: not _DATED.match(m[0]))
    yield from found(_AADHAAR, text, "ACCOUNT", accept=lambda m: not all(g[:2] in ("19", "20") for g in re.findall(r"\d{4}", m[0])))
    yield from found(_VIN, text, "ACCOUNT")
    yield from found(_WALLET, text, "WALLET")


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match["value"][:2].upper())
        if length is None:
            continue
        end, solid = match.start(), ""
        while end < match.end("value") and len(solid) < length:
            solid += text[end] if text[end].isalnum() else ""
            end += 1
        ends = end == len(text) or not text[end].isalnum()
        grouped = solid != match["value"][: len(solid)]
        # A number with the wrong checksum is somebody's typing error, where its shape or a word says that it is one at all.
        like = (grouped and solid.isupper()) or bool(_BANK_WORD.search(text[: match.start()]))
        if len(solid) == length and ends and (_mod97(solid.upper()) or (like and len(digits(solid)) >= length // 2)):
            yield Span(match.start(), end, "BANK")


def _mod97(iban: str) -> bool:
    """Check an IBAN as ISO 13616 has it: its country and check digits moved to the end, letters as 10 to 35, the rest is 1."""
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


def luhn(number: str) -> bool:
    """Check the last digit of a card's number (ISO/IEC 7812)."""
    doubled = [int(char) * (1 + place % 2) for place, char in enumerate(reversed(number))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_card(match: re.Match[str]) -> bool:
    value = match["value"]
    number = digits(value)
    if not _ISSUER.match(number) or not 13 <= len(number) <= 19:
        return False
    return luhn(number) or re.fullmatch(rf"\d{{4}}({_S})\d{{4}}\1\d{{4}}\1\d{{4}}", value) is not None


def _is_number(match: re.Match[str]) -> bool:
    value = match["value"].strip()
    if _DATED.match(value):
        # A year or a date, unless what stands before says that a number follows.
        return re.search(r"num|no\b|nr|#|code|id\b", match[0][: -len(match["value"])], re.IGNORECASE) is not None and not re.search(
            r"[./-]", value
        )
    return len(digits(value)) >= 3 and len(value) >= 4 or (value.isupper() and len(digits(value)) >= 1 and len(value) >= 5)


def _is_plain_number(match: re.Match[str]) -> bool:
    value = match["value"]
    lettered = any(char.isalpha() for char in value)
    return (
        len(digits(value)) >= (4 if lettered else 6)
        and bool(lettered or match["strong"])
        and not (_DATED.match(value) and not re.search(r"nummer|number|nr", match[0][: -len(value)], re.IGNORECASE))
    )


def _is_near(match: re.Match[str]) -> bool:
    value = match["value"]
    if _DATED.match(value) or all(re.fullmatch(r"(?:19|20)\d\d", part) for part in re.split(r"\W", value)):
        return False
    around = match.string[max(0, match.start() - 80) : match.start()], match.string[match.end() : match.end() + 60]
    return bool(_NEAR_WORD.search(around[0]) or _NEAR_AFTER.match(around[1]))
