"""Names of persons without a library: where a text itself says that a word is one. What it does not say is not found.

Known are greetings, signatures, titles, relations ("my sister Anna"), introductions, mail headers, common given names, and names that
e-mail addresses of the same records spell out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from cdcda_mobile.redaction.spans import Span, found

_CAP = r"[^\W\d_a-zß-öø-ÿ][^\W\d_]*(?:['’-][^\W\d_]+)*"
_PARTICLE = (
    r"(?:van der |van den |van |von der |von |de la |de |del |della |da |dos |du |di |bin |ibn |al[ -]|el[ -]|ter |le |la |zu |Mc "
    r"|O['’])"
)
_NAME = rf"(?:{_CAP}(?:\s(?:[A-Z]\.\s?|{_PARTICLE})?{_CAP}){{0,2}})"
_FULL = rf"(?:{_CAP}(?:\s[A-Z]\.)?\s(?:{_PARTICLE})?{_CAP})"

_NO_NAME = frozenset(
    "All Team Everyone Everybody Folks Guys Friends Friend Sir Madam Customer Hiring Manager Committee Colleague Colleagues There "
    "World Kitty Again God To For You So Very Much A An The This That These "
    "Those It I We He She They My Your His Her Our Their And Or But If In On At Of From With By As Is Are Was Were Be Been Will "
    "Would Can Could Should May Might Must Not No Yes Please Just Also "
    "Here How What When Where Who Why Which Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April "
    "June July August September October November December Jan Feb Mar "
    "Apr Jun Jul Aug Sep Sept Oct Nov Dec Mom Mum Dad Mother Father Grandma Grandpa Santa Christmas Easter Thanksgiving Diary "
    "America American English French German British Chinese Indian Europe "
    "European Google Facebook Twitter Apple Amazon Microsoft GitHub Damen Herren Frau Herr Zusammen Kollegen Team, Alle Both Hello "
    "Hi Hey Dear Thanks Thank Best Kind Regards Sincerely Love Cheers "
    "Yours Sent Mail Email Re Fwd Subject Date Ok Okay Let New Old Up Out Over Off Down Then Than Now Today Tomorrow Yesterday Happy "
    "Good Great Birthday Year Years Day Morning Evening Night Ladies "
    "Gentlemen Readers Reader Member Members Support Office Service Sales Admin Info Customers Students Parents Users User Editor "
    "Editors Board Chair Congress Senate House President Universe "
    "Everything Nothing Ciao Bonjour Hallo Hola".split()
)
# Given names that are words, months or places in everyday English stand in no list here; only the context finds those.
_GIVEN = frozenset(
    "Aaron Abigail Adam Adrian Agnes Ahmed Aisha Alan Albert Alejandro Alessandro Alex Alexander Alexandra Alice Alicia Alison "
    "Amanda Amelia Amit Amy Ana Andrea Andreas Andrew Angela Anita Anjali Ankit "
    "Ann Anna Anne Annie Anthony Antoine Antonio Arjun Arthur Ashley Barbara Beatrice Ben Benjamin Bernard Beth Bob Brandon Brian "
    "Bridget Bruno Camille Carla Carlos Carmen Caroline Catherine Cathy Cecilia "
    "Charlotte Chen Chloe Christian Christina Christine Christopher Claire Clara Claudia Colin Connor Craig Cynthia Daniel Daniela "
    "Dave David Deborah Deepak Denise Dennis Derek Diana Diego Dieter Dmitri "
    "Dominic Donald Dorothy Doug Douglas Dylan Edward Eileen Elaine Eleanor Elena Eliza Elizabeth Ellen Emily Emma Emmanuel Eric "
    "Erik Erika Erin Ethan Eva Evelyn Fatima Felix Fernando Fiona Francesca "
    "Francis Francois François Frederick Friedrich Gabriel Gareth Gary Geoffrey Gerald Giovanni Giulia Gloria Gordon Greg Gregory "
    "Hannah Hans Harold Heather Heidi Helen Helena Henri Henry Hiroshi Howard "
    "Hugh Ian Ibrahim Ingrid Irene Isaac Isabel Isabella Ivan Jacob Jacques James Jamie Jane Janet Jason Javier Jean Jeff Jeffrey "
    "Jenna Jennifer Jenny Jeremy Jerome Jessica Jim Joan Joanna Joe Johan Johann "
    "Johanna John Jonas Jonathan Jorge Jose José Joseph Joshua Juan Judith Julia Julian Julie Jürgen Karen Karl Katarina Kate "
    "Katharina Katherine Kathleen Katie Katrin Keith Kelly Kenneth Kevin Khalid Kim "
    "Klaus Kristen Kyle Lars Laura Lauren Lea Leah Leila Lena Leon Leonard Leonardo Lewis Liam Lin Linda Lisa Louis Louise Lucas "
    "Lucia Lucy Luigi Luis Lukas Lydia Madison Magdalena Marc Marcel Marco Marcus "
    "Margaret Maria María Marianne Marie Marina Mario Marjorie Marta Martha Martin Martina Mary Mateo Matt Matteo Matthew Matthias "
    "Maureen Mei Mehmet Melanie Melissa Mia Michael Michelle Miguel Mike Ming "
    "Miriam Mohamed Mohammed Monica Muhammad Nadia Naomi Natalia Natalie Nathan Neha Neil Nicholas Nicolas Nicole Nikhil Nikolai "
    "Nina Noah Nora Oliver Olivia Olga Omar Oscar Pablo Pamela Patricia Patrick Paul "
    "Paula Pauline Pedro Peggy Peter Philip Philippe Phoebe Pierre Pooja Priya Rachel Rahul Raj Rajesh Ralph Raphael Rebecca Ravi "
    "Renate Ricardo Richard Rita Robert Roberto Robin Roger Rohan Roland Ronald "
    "Rosemary Ruth Ryan Sabine Sally Samantha Samuel Sandra Sanjay Sarah Sara Scott Sean Sebastian Sergei Shaun Sharon Sheila Simon "
    "Simone Sofia Sonia Sophia Sophie Stefan Stefanie Stephanie Stephen Steve "
    "Steven Stuart Sunita Susan Susanne Suzanne Svetlana Sven Sylvia Tanya Tara Teresa Theresa Thomas Tim Timothy Tina Tom Tomas "
    "Tony Tracy Trevor Ursula Uwe Valentina Valerie Vanessa Vera Veronica Victor "
    "Vijay Vikram Vincent Vladimir Walter Wanda Wei Wendy Werner William Wolfgang Xavier Xin Yasmin Yolanda Yuki Yusuf Yves Zachary "
    "Zhang Zoe Zoë Li Wang Liu Yang Huang Zhao Wu Zhou Xu Sun Zhu".split()
)
_TITLE = (
    r"(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Rev|Reverend|Father|Sir|Dame|Herr|Herrn|Frau|Mme|Mlle|Monsieur|Madame|Mademoiselle|M\."
    r"|Señora?|Sra?|Don|Doña|Signora?|Sig|Shri|Smt|Sri|Captain|Capt|Sgt|Sergeant|Lt|Aunt|Auntie|Uncle|Tante|Onkel|Nurse|Officer)"
)
_KIN = (
    r"(?:(?:step|half|grand|god|foster|great-?grand)?-?(?:sister|brother|mother|father|mom|mum|mummy|dad|daddy|son|daughter|child|aunt"
    r"|uncle|parents?)(?:-in-law)?|sis|bro|kid|cousin|nephew|niece|wife|husband|partner"
    r"|spouse|girlfriend|boyfriend|fianc[ée]e?|ex|friend|bestie|buddy|pal|mate|neighbou?r|colleague|co-?worker|boss|manager|supervisor"
    r"|assistant|secretary|mentor|advisor|adviser|intern|apprentice|teacher|tutor|professor"
    r"|coach|trainer|student|doctor|gp|dentist|therapist|nurse|lawyer|attorney|solicitor|accountant|landlord|landlady|tenant"
    r"|room-?mate|flat-?mate|house-?mate|nanny|babysitter|client|editor|agent|plumber|electrician|builder"
    r"|Schwester|Bruder|Mutter|Vater|Freundin|Freund|Kollegin|Kollege|Chefin|Chef|Frau|Mann|Tochter|Sohn|Nachbarin|Nachbar|sœur|frère"
    r"|mère|père|amie?|collègue|mari|femme|fille|fils|hermana?|madre|padre|amig[oa]|hij[oa])"
)
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<!\w)(?:[Dd]ear|DEAR|[Hh]i|HI|[Hh]ello|[Hh]ey|[Hh]allo|[Ll]iebe[rs]?|[Ss]ehr geehrte[rs]?|[Cc]her|[Cc]hère|[Bb]onjour"
        rf"|[Bb]onsoir|[Hh]ola|[Qq]uerid[oa]|[Ee]stimad[oa]|[Cc]iao|[Cc]ar[oa]|[Gg]uten (?:Tag|Morgen|Abend)"
        rf"|[Mm]oin|[Gg]ood (?:morning|afternoon|evening)|[Tt]hanks,?|[Tt]hank you,?|[Tt]hx|[Dd]anke,?|[Mm]erci,?|[Gg]racias,?|[Cc]heers,?"
        rf"|[Cc]ongrat(?:s|ulations),?|[Hh]appy birthday,?|[Ww]elcome(?: back)?,?|RIP|[Gg]ood luck,?|[Ss]orry,?)"
        rf"\s(?:{_TITLE}\.?\s)?(?P<name>{_NAME})",
        rf"(?<!\w){_TITLE}\.?\s(?:(?:{_TITLE}\.?|[A-Z]\.)\s)*(?P<name>(?:{_PARTICLE})?{_NAME})",
        rf"\b(?:[Mm]y|[Hh]is|[Hh]er|[Oo]ur|[Tt]heir|[Yy]our|[Mm]eine?|[Uu]nsere?|[Mm]on|[Mm]a|[Mm]i"
        rf"|[Mm]ein)\s(?:[a-zäöü-]+\s)?{_KIN},?\s(?:(?:is\s|was\s)?(?:named|called|heißt|namens|s['’]appelle)\s)?(?P<name>{_NAME})",
        rf"(?<!\w)(?P<name>{_NAME}),?\s\(?(?:[Mm]y|[Hh]is|[Hh]er|[Oo]ur|[Tt]heir|[Mm]eine?|[Mm]on|[Mm]a)\s(?:[a-z-]+\s)?{_KIN}\b",
        rf"\b(?:[Mm]y name is|[Mm]y name['’]s|[Nn]ame['’]s|[Cc]all me|[Nn]amed|[Cc]alled|[Ii]ch hei(?:ß|ss)e|[Mm]ein Name ist"
        rf"|[Jj]e m['’]appelle|[Mm]e llamo|[Mm]i nombre es|[Mm]i chiamo|[Ff]ull name:?|[Nn]ame:|[Cc]ontact:|[Aa]ttn:?|[Ss]igned:?"
        rf"|[Pp]atient:?"
        rf"|[Cc]ustomer:|[Cc]lient:|[Tt]enant:|[Bb]eneficiary:|[Cc]ardholder:?|[Aa]ccount holder:?|[Rr]ecipient:|[Ss]hip to:?"
        rf"|c/o)\s(?:{_TITLE}\.?\s)?(?P<name>{_NAME})",
        rf"\b[Tt]his is\s(?P<name>{_NAME})(?=\s(?:speaking|here|from|calling|again|writing)\b)",
        rf"(?:\b(?:[Bb]est(?: regards| wishes)?|[Rr]egards|[Kk]ind(?:est)? regards|[Ww]arm(?:est|ly)?(?: regards)?|[Ss]incerely(?: yours)?"
        rf"|[Yy]ours(?: sincerely| truly| faithfully)?|[Cc]heers|[Tt]hanks|[Mm]any thanks|[Tt]hank you|[Ll]ove|[Ll]ots of love|[Hh]ugs"
        rf"|[Cc]ordially|[Rr]espectfully|[Tt]ake care|[Ss]ee you|[Tt]alk soon|xoxo|XOXO|[Vv]iele Grüße|[Bb]este Grüße|[Ll]iebe Grüße"
        rf"|[Mm]it freundlichen Grüßen|LG|VG|MfG|[Gg]ruß|[Cc]ordialement|[Bb]ien à (?:vous|toi)|[Bb]ises|[Aa]mitiés|[Ss]aludos|[Uu]n abrazo"
        rf"|[Cc]ordiali saluti)[,.!]*\s{{1,3}}|(?:^|[.!?]\s|\n)(?:--?|—|–)\s?|\s[—–]\s?|[.!?,]\s?\n)(?P<name>{_NAME})\.?\s*(?:$|\n)",
        rf"(?:\b(?:From|To|Cc|CC|Bcc|Reply-To|Author|Signed-off-by|Co-authored-by|Reviewed-by|Tested-by|Acked-by|Reported-by"
        rf"|Suggested-by)\s?:\s?)(?P<name>{_NAME})",
        rf"(?<!\w)(?P<name>{_NAME})\s?<[^<>\s]+@[^<>\s]+>",
        rf"(?:^|[.!?]\s)(?P<name>{_NAME})(?=\s(?:wrote|schrieb|a écrit|escribió)\s?:)",
        r"(?<![\u4e00-\u9fff])(?:我叫|我是|联系人[:：]?|收件人[:：]?|姓名[:：]?)(?P<name>[\u4e00-\u9fff]{2,4})(?![\u4e00-\u9fff])",
    )
)
_LISTED = re.compile(rf"(?<![\w@/.-])(?P<name>({_CAP})(?:\s(?:[A-Z]\.\s)?(?:{_PARTICLE})?{_CAP}){{0,2}})")
_MAILBOX = re.compile(r"(?<![\w.+-])(?P<box>\w[\w.+-]*)@(?:[\w-]+\.)+[^\W\d_]{2,}")
_GENERIC = frozenset(
    "info contact support sales admin office reply noreply mail hello team help service news newsletter billing jobs press media "
    "test example root webmaster postmaster abuse dev git user users the all "
    "customer care security privacy legal accounts account orders order booking bookings enquiries inquiries feedback marketing "
    "careers invoice invoices payments payment staff school home work "
    "shop store web www email mailbox not donotreply notifications notification alerts alert bot system me my own one".split()
)


class NameFinder(Protocol):
    """Finds names of persons beyond what :func:`plain_names` does."""

    label: str

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the spans of names in every text."""
        ...


def plain_names(text: str) -> Iterator[Span]:
    """Find the names that a text itself marks as such."""
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            yield from _trimmed(text, match.start("name"), match.end("name"))
    for match in _LISTED.finditer(text):
        words = match["name"].split()
        first = next((place for place, word in enumerate(words) if word in _GIVEN), None)
        if first is not None:
            yield from _trimmed(text, match.start("name") + match["name"].index(words[first]), match.end("name"))


def _trimmed(text: str, start: int, end: int) -> Iterator[Span]:
    """Cut a candidate at the first word that belongs to no name; nothing is left of one that begins with it."""
    stop = start
    for word in re.finditer(r"\S+", text[start:end]):
        bare = re.sub(r"['’]s$", "", word[0])
        if bare in _NO_NAME or (bare.isupper() and len(bare) > 3 and bare.isascii() and stop > start):
            break
        stop = start + word.start() + len(bare)
    if stop - start >= 2:
        yield Span(start, stop, "NAME")


def parts(name: str) -> list[str]:
    """Return the words of a full name that may stand for the person alone."""
    words = name.split()
    if len(words) < 2:
        return []
    return [word for word in words if len(word) >= 3 and word[0].isupper() and word not in _NO_NAME and word.casefold() not in _EVERYDAY]


def mailbox_names(text: str) -> Iterator[str]:
    """Yield the words of e-mail addresses that may be names, capitalised: Anna and Schmidt of anna.schmidt@example.com."""
    for match in _MAILBOX.finditer(text):
        for word in re.split(r"[\d._+-]+", match["box"]):
            if len(word) >= 3 and word.isalpha() and word.casefold() not in _GENERIC and word.casefold() not in _EVERYDAY:
                yield word[0].upper() + word[1:]


def capitalised(text: str, name: str) -> bool:
    """Say whether a text has a name as a word of its own."""
    return bool(list(found(re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), text, "NAME")))


# Surnames and given names that are everyday words: they count beside the rest of a name, not alone.
_EVERYDAY = frozenset(
    "young king brown green white black gray grey long short small little rich wise good best love bell hill wood woods stone rivers "
    "lake field fields ford park parks west north south east banks bush "
    "cook baker butler carter fisher hunter mason miller page porter shepherd smith taylor turner walker ward weaver bishop pope "
    "prince duke earl knight major day may june april august summer winter "
    "will mark bill frank grace hope faith rose rosa drew chase art jack rob pat guy ray dawn joy iris ivy lily violet daisy olive "
    "pearl ruby amber crystal star skip dick chip chuck gene grant "
    "lance miles norm pierce ralph rich rusty sandy sky sonny spencer sterling stew tad trey wade ward wells fox wolf lamb bird swan "
    "drake finch church temple house hall rooms street cross case "
    "cash price power powers strong sharp swift blunt moody savage noble bond book books bolt bolton bear berry bloom branch bridge "
    "bridges brook brooks camp cannon chance christian english french "
    "german ireland england london paris austin dallas houston jordan israel chelsea sydney victoria florence georgia virginia "
    "carolina dakota savannah holland france the and for van von der den del dos das "
    "sun sung ming song sing max leo ban ran can man son kim".split()
)
