"""Postal addresses: streets with numbers as several countries write them, post office boxes, postcodes with their towns."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cdcda_mobile.redaction.spans import Span, found

_UP = r"[A-ZÀ-ÖØ-ÞĀŁŚŻÇĞİŞČŘŠŽ]"
_CAP = rf"{_UP}[\w'’.-]*"
_TOWN = rf"(?:{_CAP}(?:[ -](?:am|an der|im|upon|on|sur|en|de|la|le|del|of|{_CAP})){{0,4}})"

_SUFFIX = (
    r"(?:Street|St|Avenue|Ave|Av|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|Close|Crescent"
    r"|Cres|Highway|Hwy|Parkway|Pkwy|Circle|Cir|Trail|Trl"
    r"|Alley|Row|Mews|Gardens?|Gdns|Grove|Hill|Walk|Quay|Wharf|Broadway|Plaza|Loop|Nagar|Marg|Path|Rise|Parade|Pde|Esplanade|Bazaar"
    r"|Chowk|Colony|Enclave|Layout|Vihar|Extension|Extn|Turnpike|Pike"
    r"|Freeway|Expressway|Crossing|Ridge|Heights|Bend|Cove|Park|Circus|Embankment|Galli|Salai|Cross)"
)
_LOWER_SUFFIX = r"(?:street|st|avenue|ave|road|rd|lane|ln|boulevard|blvd|crescent|terrace|drive|close|mews|gardens)"
# A street whose whole name is one word: 12 The Crescent.
_THE = (
    r"The\s(?:Street|Avenue|Lane|Drive|Close|Crescent|Terrace|Mews|Green|Grove|Square|Mount|Orchard|Paddock|Quadrant|Parade|Row"
    r"|Esplanade|Glade|Ridgeway|Rise|Broadway|Spinney|Chase|Poplars|Limes|Laurels|Willows|Beeches|Elms|Firs|Pines)"
)
_NO_STREET = (
    r"(?!(?:the|a|an|of|this|that|down|up|to|on|in|my|your|his|her|our|their|off|per|and|or|miles?|minutes?|hours?|days?|weeks?"
    r"|months?|years?|km|meters?|metres?|feet|cars?|people|men|women|times?"
    r"|lane|more|new|dirt|busy|by|from|at|with|for|across|along|under|into|blocks?|steps?|way|percent|gb|tb|mb|hard|flash|disk|usb"
    r"|thumb|scenic|long|short|first|second|other|main|side)\b)"
)
# Words of headlines, where every word has a capital: "5 People At Florida Industrial Park".
_NO_TITLE = (
    r"(?!(?:Of|The|A|An|And|Or|At|In|On|To|For|With|From|By|Your|My|Their|His|Her|Our|People|Men|Women|Things|Ways|Reasons|Years?"
    r"|Days?|Key|Interesting|Supreme|High|Federal|District|Tennis|Food"
    r"|Central|Industrial|National|Theme|Water|Amusement|State|Most|Killed|Dead|Million|Billion|Percent|Entities|Workers"
    r"|Cops)\b(?!\s(?:Street|St|Road|Rd|Avenue|Ave|Lane|Drive)\b))"
)
_ROOM = (
    r"(?:Flat|Apartment|Apt|Suite|Ste|Unit|Room|Rm|Floor|Fl|Building|Bldg|Block|Tower|Plot|House|H|Door|Shop|Villa|Office|Level|Lot|D"
    r"|Penthouse|Wohnung|Whg|Bât|Bâtiment|Appt|Appartement)"
)
_ROOMS = rf"(?:{_ROOM}\.?\s?(?:No\.?|Nos\.?|Number|#|:)?\s?#?(?=[\w/-]*\d|[A-Z]\b)[\w/-]+,?\s+)"
_NUMBER = r"(?:No\.?\s?|#\s?)?\d{1,6}(?:[A-Za-z](?![a-z])|\s?[½¼])?(?:\s?[-/–]\s?\w{1,5}){0,2}"
_UNIT = rf"(?:,?\s*(?:(?:{_ROOM})\.?\s?(?:No\.?|#)?\s?[\w-]+|#\s?[\w-]+|(?:\d{{1,2}}(?:st|nd|rd|th)\s[Ff]loor)))"
_POSTCODE = (
    r"(?:(?:AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|PR|RI"
    r"|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY)\.?,?\s\d{5}(?:-\d{4})?"
    r"|[A-Z]{1,2}\d[A-Z\d]?\s?\d[A-Z]{2}"  # United Kingdom
    r"|[ABCEGHJ-NPRSTVXY]\d[A-Z][ -]?\d[A-Z]\d"  # Canada
    r"|(?:NSW|VIC|QLD|WA|SA|TAS|ACT|NT)\s\d{4}"
    r"|\d{4}\s?[A-Z]{2}\b|\d{3}\s\d{2}|\d{3}\s\d{3}|\d{2}-\d{3}|\d{5}-\d{3,4}|\d{4,6})"
)
# After the street: parts between commas, up to a postcode and the town that stands on either side of it.
_PART = rf"(?:[,\n]|\s[-–])\s*(?!{_UP}[\w'’]*\s(?:is|was|has|will|and)\b)(?:{_CAP}|\d{{1,3}}(?:st|nd|rd|th)\s{_CAP})(?:[ -]{_CAP}){{0,3}}"
_TAIL = (
    rf"(?:(?:{_PART}){{0,5}}(?:,?\s*[-–]?\s*(?:[A-Z]{{1,2}}-)?{_POSTCODE}(?!\d)(?:,?\s(?!The|We|I|He|She|They|It|Please|Call|My"
    rf"|Our)(?:{_TOWN}))?(?:\sCedex(?:\s\d\d?)?)?(?:,\s*{_TOWN})?)|,\s{_CAP}(?:\s{_CAP}){{0,2}}(?:,\s[A-Z]{{2}}\b)?)?"
)

_ENGLISH = re.compile(
    rf"(?<![\w.,$€£-]){_ROOMS}{{0,4}}{_NUMBER}(?:,\s|\s)(?:(?:North|South|East|West|N|S|E|W|NE|NW|SE|SW)\.?\s)?(?:{_THE}|(?:(?:{_NO_TITLE}{_CAP}"
    rf"|\d{{1,3}}(?:st|nd|rd|th)|de|la)\s){{1,4}}?"
    rf"{_SUFFIX})\b\.?(?:\s(?:North|South|East|West|N|S|E|W|NE|NW|SE|SW)\b\.?)?{_UNIT}{{0,2}}{_TAIL}"
)
_LOWER = re.compile(
    rf"(?<![\w.,$€£-])(?:{_ROOM.lower()}\s?\d\w*,?\s)?\d{{1,5}}[a-z]?\s(?:[nsew]\.?\s)?(?:{_NO_STREET}[a-z][a-z'’-]+\s|\d{{1,3}}(?:st"
    rf"|nd|rd|th)\s){{1,2}}{_LOWER_SUFFIX}\b"
    r"(?:,?\s(?:apt|flat|unit|suite|#)\.?\s?\w+)?(?:,\s[a-z]+(?:\s[a-z]+)?(?:,?\s(?:[a-z]{2}\s)?(?:\d{5}"
    r"|[a-z]{1,2}\d[a-z\d]?\s?\d[a-z]{2})))?"
)
_GERMAN = re.compile(
    rf"(?<!\w)(?:{_UP}[\w-]*(?:straße|strasse|str\.|gasse|weg|platz|allee|(?<=[bdfghklmnrstwz])ring(?<!pring)(?<!tring)|damm|ufer"
    rf"|chaussee|steig|stieg|markt|hof|graben|promenade|pfad|zeile)"
    rf"|(?:{_CAP}(?:[ -])){{1,3}}(?:Straße|Strasse|Str\.|Gasse|Weg|Platz|Allee|Ring|Damm|Ufer|Chaussee|Graben|Markt)"
    rf"|(?:Am|An der|An den|Auf der|Auf dem|Im|In der|In den|Unter den|Zum|Zur|Hinter der|Vor dem|Bei der|Beim)\s(?!Januar|Februar|März"
    rf"|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember"
    rf"|Montag|Dienstag|Mittwoch|Donnerstag|Freitag|Samstag|Sonntag|Jahr|Alter){_CAP})"
    rf"\s(?:Nr\.?\s?)?\d{{1,4}}\s?[a-zA-Z]?\b(?:\s?[-/–]\s?\d{{1,4}}\s?[a-z]?\b)?(?:,?\s(?:\d\.\s(?:OG|Stock|Etage)|EG|DG|Hinterhaus"
    rf"|Whg\.?\s\d+))?(?:,?\s*(?:(?:in|D|A|CH)[ -])?\d{{4,5}}\s{_TOWN})?"
)
_ROMANCE = re.compile(
    rf"(?<![\w-])(?:\d{{1,4}}(?:\s?(?:bis|ter|quater|[A-D]))?,?\s(?i:rue|avenue|av\.|boulevard|bd\.?|blvd|place|pl\.|impasse|allée"
    rf"|chemin|quai|route|cours|square|passage|sentier|faubourg|villa)\s"
    rf"(?:(?:de\sla|de\sl['’]|du|des|de|la|le|les|d['’]|l['’]|à|aux|et|sous|sur)\s?|[\w'’.-]+[ -]?){{1,6}}?(?=,|\.|;|$|\s\d|\n"
    rf"|\s[a-z])(?:,?\s*(?:F-)?\d{{5}}\s{_TOWN}(?:\s(?:Cedex|CEDEX)(?:\s\d\d?)?)?)?"
    rf"|(?:Calle|C/|Avenida|Avda\.?|Av\.|Plaza|Paseo|Carrer|Via|Viale|Piazza|Corso|Largo|Rua|Praça|Travessa|ul\.|ulica|al\.)\s?(?:(?:de"
    rf"|del|della|dei|degli|delle|dello|di|da|das|do|dos|la|las|los|el|e)\s|{_CAP}\s){{0,5}}{_CAP}"
    rf",?\s(?:n[º°.]?\s?)?(?!(?:19"
    rf"|20)\d\d\b)\d{{1,4}}[a-zA-Z]?\b(?:,\s\d{{1,2}}[º°ª]?\s?\w{{0,2}}\b)?(?:,?\s*\d{{2}}-?\d{{3}}(?:-\d{{3}})?\s{_TOWN})?"
    rf"|{_UP}\w+(?:straat|laan|plein|gracht|kade|dijk|singel|gatan|vägen|vej|gade|gata|veien"
    rf"|gaten)\s\d{{1,4}}\s?[a-zA-Z]?\b(?:-\d+)?(?:,?\s*\d{{4}}\s?[A-Z]{{0,2}}\s{_TOWN})?"
    rf"|(?:ул\.|улица|пр\.|проспект)\s?[\w .-]{{2,40}},?\s(?:д\.|дом)?\s?\d+\w?(?:,?\s(?:кв\.|квартира)\s?\d+)?)",
)
_INDIAN = re.compile(
    rf"(?<!\w)(?:{_ROOMS}{{1,4}}+|(?:No\.?\s?|#\s?)?\d{{1,4}}(?:[/-]\w{{1,4}}){{0,3}},\s)(?:{_CAP}|\d{{1,3}}(?:st|nd|rd|th))"
    rf"(?:[ -](?:{_CAP}"
    rf"|\d+)){{0,4}}(?:,\s*(?:{_CAP}|\d{{1,3}}(?:st|nd|rd|th))(?:[ -](?:{_CAP}|\d{{1,3}}\b)){{0,4}}){{0,5}}"
    r",?\s*[-–]?\s*(?:PIN\W{0,3})?\d{3}\s?\d{3}(?!\d)"
)
_CHINESE = re.compile(
    r"(?:[\u4e00-\u9fff]{2,8}?(?:省|自治区))?(?:[\u4e00-\u9fff]{2,6}?市)?(?:[\u4e00-\u9fff]{1,6}?(?:区|县|镇|乡)){0,3}[\u4e00-\u9fff]{1,10}?(?:大道"
    r"|大街|路|街|道|巷|弄|胡同)\d+(?:号|弄)"
    r"(?:[\u4e00-\u9fff]{0,8}?[\dA-Z一二三四五六七八九十-]+(?:号楼|号|室|楼|栋|幢|单元|层|座))*"
)
_BOX = re.compile(
    rf"\b(?:(?:G\.?\s?)?P\.?\s?O\.?\s?B(?:ox|OX|\.)?|[Pp]\.?[Oo]\.?\s?[Bb]ox|Post(?:al)?\s(?:Office\s)?Box|Postfach|Boîte [Pp]ostale|BP"
    rf"|B\.P\.|Apartado(?:\s(?:de\s)?(?:[Pp]ostal|[Cc]orreos))?|Casella [Pp]ostale|Postbus|PMB"
    rf"|Private Bag|(?:RR|R\.R\.|Rural Route)\s?#?\d+,?\sBox|P\.?O\.?\sBOX)\s?(?:#|No\.?\s?|n°\s?)?\s?\d[\d ]{{0,8}}\d?(?:{_TAIL}"
    rf"|,?\s*\d{{5}}\s{_TOWN})"
)
_CITIES = (
    r"(?:Berlin|Hamburg|München|Munich|Köln|Cologne|Frankfurt|Stuttgart|Düsseldorf|Leipzig|Dortmund|Essen|Bremen|Dresden|Hannover"
    r"|Nürnberg|Duisburg|Bochum|Bonn|Münster|Mannheim|Karlsruhe|Augsburg"
    r"|Wiesbaden|Kiel|Freiburg|Mainz|Heidelberg|Potsdam|Wien|Graz|Linz|Salzburg|Innsbruck|Zürich|Genève|Basel|Bern|Lausanne|Paris"
    r"|Marseille|Lyon|Toulouse|Nice|Nantes|Strasbourg|Montpellier|Bordeaux"
    r"|Lille|Rennes|Reims|Grenoble|Dijon|Madrid|Barcelona|Valencia|Sevilla|Roma|Milano|Napoli|Torino|Firenze|Bologna|Bruxelles|Lisboa"
    r"|Mumbai|Delhi|New Delhi|Bengaluru|Bangalore|Chennai|Kolkata"
    r"|Hyderabad|Pune|Ahmedabad|Jaipur|Noida|Gurgaon|Gurugram|Lucknow|Kochi|Indore|Bhopal|Chandigarh|Beijing|Shanghai|Shenzhen"
    r"|Guangzhou|Hangzhou|Chengdu|Wuhan|Nanjing|Singapore)"
)
_PLACED = re.compile(
    rf"(?<![\w.-])(?:(?:D|A|CH|F|B|L)-\d{{4,5}}\s{_TOWN}|\d{{4,6}}\s{_CITIES}\b|{_CITIES}\s?[,–-]?\s?\d{{3}}\s?\d{{3}}(?!\d)"
    rf"|\d{{4}}\s[A-Z]{{2}}\s{_TOWN}"
    rf"|{_CAP}(?:\s{_CAP}){{0,2}},\s(?:AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM"
    rf"|NY|NC|ND|OH|OK|OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY)"
    rf"\s\d{{5}}(?:-\d{{4}})?(?!\d)|(?:London|{_CAP}),?\s[A-Z]{{1,2}}\d[A-Z\d]?\s\d[A-Z]{{2}}(?!\w)"
    rf"|[A-Z]{{1,2}}\d[A-Z\d]?\s\d[ABD-HJLNP-UW-Z]{{2}}(?!\w)"
    r"|[ABCEGHJ-NPRSTVXY]\d[ABCEGHJ-NPRSTV-Z] \d[ABCEGHJ-NPRSTV-Z]\d(?!\w))"
)
_CODED = re.compile(
    r"\b(?:zip(?:[ -]?code)?|post(?:al)?[ -]?code|plz|postleitzahl|code postal|pin[ -]?code|cap|cp|邮编)\W{0,3}(?:is\s|ist\s"
    r"|est\s)?(?P<value>\d{3}\s?\d{3}|\d{4,5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]?\s?\d[A-Z]{2})(?!\w)",
    re.IGNORECASE,
)
_YEAR_ON_WALL_STREET = re.compile(r"(?:19|20)\d\d Wall St")


def addresses(text: str) -> Iterator[Span]:
    """Find postal addresses."""
    for pattern in (_ENGLISH, _LOWER, _GERMAN, _ROMANCE, _INDIAN, _CHINESE, _BOX, _PLACED):
        yield from found(pattern, text, "ADDRESS", accept=lambda m: not _YEAR_ON_WALL_STREET.match(m[0]))
    yield from found(_CODED, text, "ADDRESS", "value")
