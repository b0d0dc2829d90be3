"""Numbers and places of made-up people: telephones, bank accounts, cards, papers, customer accounts, postal addresses."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from planted_values import NB_HYPHEN, NBSP, Maker, Value, fill, grouped, luhn, made, patterns

# Numbers: telephones, accounts, cards, identity.

_PHONES = {
    "us-parentheses": "(~) 555-01##", "us-international": "+1 ~-555-01##", "us-dots": "~.555.01##", "us-dashes": "~-555-01##",
    "us-bare": "~55501##", "us-e164": "+1~55501##", "us-extension": "~-555-01## ext. 2##", "uk-mobile": "07700 900###",
    "uk-london": "+44 20 7946 0###", "uk-zero": "+44 (0)161 496 0###", "de-slash": "030/23125 ###", "de-international": "+49 171 39200##",
    "de-zero": "+49 (0)89 4567 ####", "de-00": "0049 40 66969 ###", "fr-pairs": "06 39 98 ## ##", "fr-dots": "01.42.68.##.##",
    "fr-international": "+33 6 39 98 ## ##", "es": "+34 612 34# ###", "nl-dash": "06-1234####", "ch": "+41 44 668 1# ##",
    "in": "+91 98765 4####",
    "br": "(11) 91234-5###", "jp": "03-1234-5###", "au": "0491 570 ###", "se": "070-174 06 ##", "it": "+39 347 123 4###",
    "nbsp": f"+43{NBSP}660{NBSP}123{NBSP}4###", "nb-hyphen": f"~{NB_HYPHEN}555{NB_HYPHEN}01##", "tel-uri": "tel:+1-~-555-01##",
}  # fmt: skip


_IBANS = {"DE": "##################", "GB": "@@@@##############", "FR": "#####################A##", "ES": "####################",
"NL": "@@@@##########",
          "IT": "@######################", "CH": "#################", "AT": "################", "PL": "########################",
          "BE": "############"}  # fmt: skip


def _iban(form: str, country: str, write: Callable[[str], str]) -> Maker:
    def make(rng: random.Random) -> Value:
        bban = fill(rng, _IBANS[country])[:23]
        number = "".join(str(int(char, 36)) for char in bban + country + "00")
        text = write(f"{country}{98 - int(number) % 97:02d}{bban}")
        return Value("iban", form, text, (text,), numeric=True)

    return make


_WRITE_IBAN: dict[str, Callable[[str], str]] = {
    "spaced": lambda t: grouped(t, [4]),
    "solid": lambda t: t,
    "lower": lambda t: grouped(t, [4]).lower(),
    "dashes": lambda t: grouped(t, [4], "-"),
    "nbsp": lambda t: grouped(t, [4], NBSP),
}
_IBAN_FORMS = {
    f"{country.lower()}-{form}": _iban(f"{country.lower()}-{form}", country, _WRITE_IBAN[form])
    for country, form in zip((*_IBANS, *_IBANS), ("spaced", "solid", "spaced", "solid", "lower", "dashes", "nbsp") * 3, strict=False)
}


def _card(form: str, start: str, length: int, sizes: Sequence[int], separator: str) -> Maker:
    def make(rng: random.Random) -> Value:
        text = grouped(luhn(start + fill(rng, "#" * (length - 1 - len(start)))), sizes, separator)
        return Value("card", form, text, (text,), numeric=True)

    return make


_CARDS = {
    f"{brand}-{form}": _card(f"{brand}-{form}", start, length, sizes if separator else [length], separator)
    for brand, start, length, sizes in (
        ("visa", "4", 16, [4]), ("mastercard", "53", 16, [4]), ("mastercard2", "2221", 16, [4]), ("amex", "37", 15, [4, 6, 5]),
        ("discover", "6011", 16, [4]),
    )
    for form, separator in (("spaces", " "), ("solid", ""), ("dashes", "-"))
}  # fmt: skip


def _spanish_dni(rng: random.Random) -> str:
    number = fill(rng, "N#######")
    return number + "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]


def _cpf(rng: random.Random) -> str:
    digits = [int(d) for d in fill(rng, "#########")]
    for start in (10, 11):
        rest = sum(d * (start - i) for i, d in enumerate(digits)) % 11
        digits.append(0 if rest < 2 else 11 - rest)
    text = "".join(map(str, digits))
    return f"{text[:3]}.{text[3:6]}.{text[6:9]}-{text[9:]}"


def _french_nir(rng: random.Random) -> str:
    body = rng.choice("12") + fill(rng, "##") + f"{rng.randint(1, 12):02d}" + fill(rng, "75###0##")
    key = 97 - int(body) % 97
    return f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {key:02d}"


def _pesel(rng: random.Random) -> str:
    body = fill(rng, "8#") + f"{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}" + fill(rng, "####")
    return body + str(-sum(int(d) * w for d, w in zip(body, (1, 3, 7, 9) * 3, strict=False)) % 10)


_NATIONAL = {
    **patterns("national_id", {
        "us-ssn-dashes": "SSN|5##-4#-N###", "us-ssn-spaces": "social security number|5## 4# N###", "us-ssn-solid": "SSN|5##4#N###",
        "uk-nino-spaces": "NI number|AB ## ## ## C", "uk-nino-solid": "National Insurance number|JK######D",
        "de-tax": "Steuer-ID|N# ### ### ###",
        "us-passport": "passport number|@########", "de-passport": "passport no.|C01X0N###", "in-pan": "PAN|ABCP@####K",
        "in-aadhaar": "Aadhaar|N### #### ####", "us-licence": "driver's license|@###-####-####", "ch-ahv": "AHV number|756.####.####.##",
    }),
    "es-dni": made("national_id", "es-dni", "DNI", _spanish_dni),
    "br-cpf": made("national_id", "br-cpf", "CPF", _cpf),
    "fr-nir": made("national_id", "fr-nir", "numéro de sécu", _french_nir),
    "pl-pesel": made("national_id", "pl-pesel", "PESEL", _pesel),
    "ca-sin": made("national_id", "ca-sin", "SIN", lambda rng: grouped(luhn(fill(rng, "N#######")), [3])),
    "se-personnummer": made("national_id", "se-personnummer",
    "personnummer", lambda rng: luhn(fill(rng, "8#0N1####"))[:6] + "-" + fill(rng, "####")),
}  # fmt: skip
_ACCOUNTS = patterns("account", {
    "customer-dash": "customer number|N###-#####", "customer-no": "customer no.|N#######", "kundennummer": "Kundennummer|N### ### ##",
    "account-spaces": "account number|N### #### ##", "account-hash": "account #|N########", "acct": "acct|00N######",
    "policy": "policy number|@@-###-####", "member": "member ID|@########",
    "patient": "patient number|@@N######", "contract": "contract number|@#-####-##", "client": "client ID|N####-@@",
    "meter": "customer reference|@@@@ #### ####",
})  # fmt: skip


# Addresses: the street with its number gives one away, whatever became of the town; in brackets where more stands on that line.

_STREETS = {
    "us-full": (("[N### {us}], Apt #@", "Springfield, IL 62704"), ("N### {us}", "Boise, ID 837##")),
    "us-direction": (("N### W. N#th St", "Topeka, KS 66603"), ("N### E. {us}", "Seattle, WA 981##")),
    "us-no-town": (("N### {us}", ""),),
    "us-po-box": (("P.O. Box N###", "Missoula, MT 598##"),),
    "uk": (("N# {uk}", "Leeds LS6 2@@"), ("Flat N, [N# {uk}]", "Bristol, BS8 #@@")),
    "uk-no-town": (("N# {uk}", ""),),
    "de": (("{de} N#", "10#69 Berlin"), ("{de} #a", "506## Köln")),
    "de-abbreviated": (("{de1} N#", "80### München"),),
    "de-no-town": (("{de} N#", ""),),
    "fr": (("N#, {fr}", "6900# Lyon"), ("N# bis {fr}", "75011 Paris")),
    "es": (("[{es} N#], 3º B", "280## Madrid"),),
    "it": (("{it} N#", "201## Milano (MI)"),),
    "nl": (("{nl} N##", "101# DX Amsterdam"), ("{nl} ##-II", "3511 AB Utrecht")),
    "au": (("N/## {uk}", "Brunswick VIC 305#"),),
    "ca": (("N## {us}", "Vancouver, BC V5K 0A#"),),
    "in": (("Flat N0#, [Lotus Residency, {in}]", "Bengaluru 5600##"),),
    "br": (("{br}, N##", "São Paulo - SP, 054##-001"),),
    "pl": (("{pl} N/##", "00-2## Warszawa"),),
}
_STREET_NAMES = {
    "us": ("Maple Avenue", "Elm Street", "Sycamore Ln", "Old Mill Road", "Juniper Blvd", "Cedar Ct"), "uk": ("Harrow Lane", "Station Road",
    "Kings Close", "Mill Hill", "The Crescent"),
    "de": ("Lindenstraße", "Am Alten Markt", "Goetheweg", "Kastanienallee", "Hafenplatz"), "de1": ("Schillerstr.", "Bahnhofstr."),
    "fr": ("rue des Lilas", "avenue Jean Jaurès", "boulevard Voltaire", "impasse du Moulin"), "es": ("Calle Mayor",
    "Avda. de la Constitución", "C/ Toledo"),
    "it": ("Via Garibaldi", "Corso Vittorio Emanuele", "Piazza Dante"), "nl": ("Keizersgracht", "Oudegracht", "Dorpsstraat"),
    "in": ("MG Road", "12th Main Road"),
    "br": ("Rua das Flores", "Avenida Paulista"), "pl": ("ul. Długa", "al. Jerozolimskie"),
}  # fmt: skip


def _address(form: str, shapes: Sequence[tuple[str, str]]) -> Maker:
    def make(rng: random.Random) -> Value:
        street, town = rng.choice(shapes)
        # Names first: they may hold the signs of a pattern.
        parts = [rng.choice(_STREET_NAMES[part]) if part in _STREET_NAMES else fill(rng, part) for part in re.split(r"[{}]", street)]
        line = "".join(parts)
        core = line.partition("[")[2].partition("]")[0] or line
        line = line.replace("[", "").replace("]", "")
        return Value("address", form, f"{line}, {fill(rng, town)}" if town else line, (core,))

    return make


def number_tables() -> dict[str, dict[str, Maker]]:
    """Return the kinds of this module with their forms."""
    return {
        "phone": patterns("phone", _PHONES),
        "address": {form: _address(form, shapes) for form, shapes in _STREETS.items()},
        "iban": _IBAN_FORMS,
        "card": _CARDS,
        "national_id": _NATIONAL,
        "account": _ACCOUNTS,
    }
