"""The card and the report: complete, safe with any text, and standing whatever is missing."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from cdcda_export.card import plain_lines, print_card, render_card
from cdcda_export.card_facts import NOT_APPLICABLE
from cdcda_export.card_values import clean, duration, number, percent, shorten, size
from cdcda_export.report import report_html, write_report
from cdcda_export.report_plot import curve_svg, gate_svg, ticks

CSS = Path(__file__).resolve().parent.parent / "export" / "cdcda_export" / "report.css"
VOID = {"meta", "br", "hr", "link", "img", "input"}

FULL: dict[str, Any] = {
    "user": "42",
    "base": {"name": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": "3c0a" * 16},
    "artifact": {
        "file": "runs/42/gguf-q4_0/model.gguf",
        "bytes": 91726912,
        "format": "gguf",
        "quant": "q4_0",
        "tensor_types": {"Q4_0": 210, "F32": 61, "Q8_0": 1},
        "double_quantized": "quantized twice: the base was Q4_1 already, its tensors became Q4_0",
        "sha256": "ab12" * 16,
    },
    "verification": {
        "level": "full",
        "passed": True,
        "token_ids": {"texts": 38, "equal": 37},
        "kl_mean": 0.031,
        "kl_gate": 0.12,
        "top1": 0.93,
        "top1_gate": 0.8,
        "positions": 413,
        "nll": 3.522,
        "nll_reference": 3.411,
        "reference": "merged model in float32 (torch)",
        "failures": [],
    },
    "personal_gain": {"nll_base": 4.612, "nll_personal_f32": 3.411, "nll_personal": 3.522, "survived": 0.91, "tokens": 412},
    "tasks": [
        {
            "task": "headline",
            "n": 12,
            "nll_base": 4.901,
            "nll_personal": 3.702,
            "metric": "ROUGE-L",
            "lower_is_better": False,
            "base": 0.081,
            "personal": 0.134,
            "more": {"ROUGE-1": [0.102, 0.153]},
        },
        {
            "task": "rating",
            "n": 7,
            "nll_base": 1.211,
            "nll_personal": 0.833,
            "metric": "MAE",
            "base": 1.143,
            "personal": 0.429,
            "more": {"RMSE": [1.363, 0.655], "accuracy": [0.571, 0.286]},
        },
    ],
    "samples": [
        {
            "task": "headline",
            "date": f"2025-05-0{i}",
            "input": f"Prompt number {i}, " + "and the snow lay deep on the Tuesday " * 12,
            "base": f"the base says {i} " + "and goes on and on " * 8,
            "personal": f"the personal model says {i}",
            "user": f"the user wrote {i}",
        }
        for i in (1, 2, 3)
    ],
    "training": {
        "curve": [
            {"step": 0, "epoch": 0.0, "validation_nll": 4.615},
            {"step": 12, "epoch": 1.0, "train_loss": 3.917, "validation_nll": 3.555},
            {"step": 24, "epoch": 2.0, "train_loss": 3.418, "validation_nll": 3.666},
        ],
        "records": {"train": 60, "validation": 8, "test": 19, "synthetic": 32, "malformed": 4},
        "rank": 16,
        "epochs": 2,
        "best_step": 12,
        "steps": 24,
        "tokens_per_second": 211.0,
        "seconds": 88.0,
        "peak_rss_bytes": 1432000000,
    },
    "augmentation": {
        "teacher": "SmolLM2-135M-Instruct (embedded)",
        "embedded": True,
        "kept": 32,
        "rejected": 20,
        "reasons": {"near duplicate": 9, "copies a training record": 6, "not a rating": 5},
        "requests": 52,
        "seconds": 70.4,
    },
    "warnings": ["3 of the rows read are not used."],
    "next": [["Talk to it", "cdcda chat runs/42"], ["Read the report", "runs/42/report.html"]],
    "stages": [{"name": "history", "seconds": 0.4, "reused": True}, {"name": "adapter", "seconds": 90.3, "reused": False}],
    "versions": {"python": "3.11.7", "numpy": "2.3.1"},
    "created": "2026-02-03T10:11:12+00:00",
}
MINIMAL: dict[str, Any] = {"artifact": {}, "verification": {}}
HOSTILE_TEXT = (
    "<script>alert(1)</script></style></title>\"'> [bold red]not markup[/] [/] \x1b[31mred\x1b[0m \x1b]0;title\x07 "
    "\x1b]8;;http://evil.test\x1b\\ \x9b31m \x00 \b\b \r\nverified: yes \u202eesrever\u202c \ud800 "
    "<img src=http://evil.test/x onerror=alert(1)> <b>\x7f"
)


def poisoned(value: Any) -> Any:
    """The same card with hostile text as every string and in every free key."""
    if isinstance(value, dict):
        return {key: poisoned(v) for key, v in value.items()} | ({HOSTILE_TEXT: 3} if "F32" in value or "train" in value else {})
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return HOSTILE_TEXT if isinstance(value, str) and value not in ("full", "off") else value


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "full", FULL
    yield "minimal", MINIMAL
    yield "empty", {}
    yield "hostile", poisoned(FULL)
    for key in FULL:
        yield f"without {key}", {k: v for k, v in FULL.items() if k != key}
        yield f"null {key}", {**FULL, key: None}
        yield f"number as {key}", {**FULL, key: 7}
        yield f"nulls in {key}", {**FULL, key: [None, {}, [], "x"]}
        yield f"empty {key}", {**FULL, key: {}}
    for key in ("artifact", "verification", "personal_gain", "training", "augmentation"):
        for inner in FULL[key]:
            for wrong in (None, float("nan"), 10**400, {"a": None}, [[1]]):
                yield f"{wrong!r:.9} as {key}.{inner}", {**FULL, key: {**FULL[key], inner: wrong}}
    yield "off", {**FULL, "verification": {"level": "off"}}
    yield "no user", {**FULL, "user": None, "adapter": "/somewhere/my-adapter", "personal_gain": None}


ALL = dict(variants())


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Balanced(HTMLParser):
    """Fails where a tag is not closed in order; keeps what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def rendered(card: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(render_card(card, width))
    return stream.getvalue()


def printed(card: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_card(card, stream)
    return stream.getvalue()


# Any card.


@pytest.mark.parametrize("name", ALL)
def test_any_card_renders_everywhere(name: str) -> None:
    card = ALL[name]
    text = printed(card)
    assert "\x1b" not in text and "─" not in text
    assert max(cell_len(line.rstrip()) for line in rendered(card).splitlines()) <= 80
    page = parsed(report_html(card))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    report_html(card).encode()  # no lone surrogate is left


@pytest.mark.parametrize("key", ["personal_gain", "tasks", "samples", "training", "augmentation", "stages"])
def test_what_is_missing_is_not_applicable(key: str) -> None:
    card = {**FULL, key: None}
    assert printed(FULL).count(NOT_APPLICABLE) == rendered(FULL).count(NOT_APPLICABLE) == 0
    assert NOT_APPLICABLE not in report_html(FULL).lower()
    assert printed(card).count(NOT_APPLICABLE) == rendered(card).count(NOT_APPLICABLE) == 1
    assert report_html(card).lower().count(NOT_APPLICABLE) == 1


# The terminal.


def test_terminal_card_is_compact_and_complete() -> None:
    text = rendered(FULL)
    assert len(text.splitlines()) <= 45
    for expected in (
        "KL 0.031 (gate 0.12)  top-1 93 % (gate 80 %)", "91.7 MB", "Q4_0 x210", "F32 x61", "quantized twice", "37 of 38 texts",
        "4.612 → 3.522", "91 % of the gain survived", "↑ ROUGE-L 0.081 → 0.134", "↓ MAE 1.143 → 0.429", "n=12", "n=7",
        "the personal model says 3", "the user wrote 2", "32 kept, 20 rejected", "--teacher-base-url URL", "OPENAI_API_KEY",
        "history reused", "rank 16", "best 12", "211 tokens/s", "3 of the rows", "cdcda chat runs/42",
    ):  # fmt: skip
        assert expected in " ".join(text.split()) or expected in text, expected


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_terminal_card_keeps_to_its_width(width: int) -> None:
    assert max(cell_len(line.rstrip()) for line in rendered(FULL, max(40, width)).splitlines()) <= max(40, width)


def test_terminal_gets_rich_and_a_pipe_gets_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    print_card(FULL, terminal)
    assert "\x1b[" in terminal.getvalue() and "✓" in terminal.getvalue()
    assert "KL 0.031 (gate 0.12)  top-1 93 % (gate 80 %)" in printed(FULL)
    monkeypatch.setenv("TERM", "dumb")
    dumb = Terminal()
    print_card(FULL, dumb)
    assert dumb.getvalue() == printed(FULL)


def test_plain_card_says_everything_in_one_line_each() -> None:
    lines = plain_lines(FULL)
    assert lines[0] == "The model of user 42: verified"
    assert "task headline (n 12): NLL 4.901 -> 3.702  ROUGE-L 0.081 -> 0.134  ROUGE-1 0.102 -> 0.153" in lines
    assert "sample 2 user: the user wrote 2" in lines
    assert "next: Talk to it: cdcda chat runs/42" in lines
    assert "warning: 3 of the rows read are not used." in lines
    assert "".join(lines).isascii() is False  # an ellipsis where a prompt was cut, and nothing else
    assert "".join(lines).replace("…", "").isascii()


def test_a_pipe_that_is_not_utf8_gets_no_traceback() -> None:
    raw = io.BytesIO()
    pipe = io.TextIOWrapper(raw, encoding="ascii")
    print_card({**FULL, "user": "Zoë→"}, pipe)
    assert b"The model of user Zo??" in raw.getvalue()


def test_hostile_text_does_nothing_in_a_terminal() -> None:
    card = poisoned(FULL)
    assert "\nverified: yes" not in printed(card)
    for text in (printed(card), rendered(card)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    # Shown as it was written, and not obeyed.
    assert "[bold red]not markup[/]" in printed(card)
    assert "[bold red]" in rendered(card)


@pytest.mark.parametrize("personal", [4.612, 5.0])
def test_no_personal_gain_is_a_warning(personal: float) -> None:
    card = {**FULL, "warnings": [], "personal_gain": {**FULL["personal_gain"], "nll_personal": personal}}
    for text in (printed(card), rendered(card), report_html(card)):
        assert "No personal gain" in text
    assert "No personal gain" not in printed(FULL)


def test_failure_and_absence_of_verification_are_told() -> None:
    failed = copy.deepcopy(FULL)
    failed["verification"] |= {"passed": False, "failures": ["KL divergence 0.5 is above the gate"]}
    assert "did not pass its gate" in printed(failed) and "FAILED" in printed(failed)
    assert "KL divergence 0.5 is above the gate" in report_html(failed)
    assert 'class="badge bad"' in report_html(failed)
    off = {**FULL, "verification": {"level": "off", "passed": True}}
    assert plain_lines(off)[0].endswith("not verified")
    assert 'class="badge unknown"' in report_html(off)


def test_a_strong_teacher_gets_no_advice() -> None:
    card = {**FULL, "augmentation": {**FULL["augmentation"], "embedded": False}}
    for text in (printed(card), rendered(card), report_html(card)):
        assert "--teacher-base-url" not in text
    assert "--teacher-base-url" in report_html(FULL)


def test_many_warnings_and_tasks_stay_compact() -> None:
    card = {**FULL, "warnings": [f"warning {i}" for i in range(30)], "tasks": FULL["tasks"] * 6}
    assert len(rendered(card).splitlines()) < 62
    assert "and 25 more warnings" in rendered(card) and "and 7 more tasks" in rendered(card)
    assert "warning 29" in report_html(card)


# The report.


def numbers_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_of(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value).removesuffix(".0")


def test_report_holds_every_number_of_the_card() -> None:
    words = " ".join(parsed(report_html(FULL)).words)
    # Shares are shown as percentages, memory and times rounded, and a reused stage without its time.
    shown = {"0.93": "93 %", "0.8": "80 %", "0.91": "91 %", "1432000000": "1.4 GB", "70.4": "70 s", "90.3": "90 s", "0.4": "reused"}
    for value in numbers_of(FULL):
        assert re.search(rf"(?<![\d.]){re.escape(shown.get(value, value))}(?!\d)", words), value
    for text in ("merged model in float32 (torch)", "Quantized twice", "near duplicate", FULL["artifact"]["sha256"], "3.11.7"):
        assert text in words


def test_report_is_self_contained_and_runs_nothing() -> None:
    for card in (FULL, MINIMAL, poisoned(FULL)):
        page = report_html(card)
        for tag, attributes in parsed(page).tags:
            assert tag not in {"script", "link", "img", "iframe", "object", "a", "base", "form"}, tag
            for name, value in attributes.items():
                assert not name.startswith("on") and name not in {"src", "href", "srcset", "action"}
                assert not re.search(r"https?:|url\(|javascript:", value or ""), (tag, name)
        style = page.partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in style and "@import" not in style and "http" not in style
        assert "default-src 'none'" in page


def test_hostile_text_is_only_text_in_the_report() -> None:
    page = report_html(poisoned(FULL))
    structure = [tag for tag, _ in parsed(page).tags]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "b" not in structure and structure.count("title") == 1 + page.count("</circle>")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)


def test_report_is_written_whole_and_private(tmp_path: Path) -> None:
    write_report(poisoned(FULL), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_mode & 0o077 == 0
    assert parsed((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_report_is_accessible() -> None:
    page = parsed(report_html(FULL))
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") == 2
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")
    levels = [int(tag[1]) for tag in names if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")


def test_a_long_prompt_folds_away_and_stays_readable() -> None:
    page = report_html(FULL)
    assert page.count("<summary>Whole text</summary>") == 3
    assert "Prompt number 1, " + "and the snow lay deep on the Tuesday " * 11 in page


def palettes() -> list[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", CSS.read_text(), re.DOTALL)[:2]
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast_in_light_and_dark(scheme: int) -> None:
    colours = palettes()[scheme]
    pairs = [(ink, paper) for ink in ("text", "muted", "accent", "good", "bad", "plain") for paper in ("page", "card")]
    pairs += [("good", "good-soft"), ("bad", "bad-soft"), ("warn", "warn-soft"), ("text", "warn-soft")]
    pairs += [("accent", "accent-soft"), ("text", "accent-soft"), ("muted", "accent-soft")]
    for ink, paper in pairs:
        dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


# The plots.


@pytest.mark.parametrize(
    ("curve", "lines", "points"),
    [
        ([], 0, 0),
        ([{"step": 0}], 0, 0),
        ([{"step": 5, "validation_nll": 3.0}], 0, 1),
        ([{"step": 0, "validation_nll": 4.0}, {"step": 1, "validation_nll": 3.0}], 1, 2),
        ([{"step": 0, "validation_nll": 3.0}, {"step": 9, "validation_nll": 3.0}], 1, 2),
        ([{"step": 3, "train_loss": 4.0}, {"step": 6, "train_loss": 3.0}], 1, 2),
        ([{"step": 0, "validation_nll": float("nan")}, {"step": 2, "validation_nll": 1e300}, {"step": "x", "train_loss": None}], 0, 0),
        (FULL["training"]["curve"], 2, 5),
    ],
)
def test_curve_works_with_any_points(curve: list[dict[str, Any]], lines: int, points: int) -> None:
    svg = curve_svg(curve, None, 860, 320)
    assert (svg.count("<polyline"), svg.count("<circle")) == (lines, points)
    assert "nan" not in svg and "inf" not in svg
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert 0 <= float(x) <= 860 and 0 <= float(y) <= 320
    if points:
        parsed(svg)
        assert "training step" in svg and "nats per token" in svg and "aria-label" in svg


def test_curve_falls_where_the_loss_falls_and_marks_the_best_step() -> None:
    svg = curve_svg(FULL["training"]["curve"], 12, 860, 320)
    points = re.search(r'<polyline class="validation" points="([^"]+)"', svg)
    assert points
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in points[1].split())
    assert x0 < x1 < x2 and y0 < y2 < y1  # down the page is a lower loss
    assert "kept: step 12" in svg and svg.count('class="best"') == 1
    assert "kept" not in curve_svg(FULL["training"]["curve"], None, 860, 320)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.4, 4.7), (0.001, 0.0013), (5, 5), (0, 7313), (-2, 3)])
def test_ticks_are_round_and_span_the_data(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert 2 <= len(found) <= 9
    steps = {round(b - a, 9) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1


def test_gate_marks_a_failure() -> None:
    assert "failed" not in gate_svg(0.1, 0.2, "KL", str, True)
    assert "failed" in gate_svg(0.3, 0.2, "KL", str, True)
    assert "failed" not in gate_svg(0.9, 0.8, "top-1", str, False)
    assert "failed" in gate_svg(0.7, 0.8, "top-1", str, False)
    assert gate_svg(None, 0.8, "top-1", str, False) == ""


# Values.


def test_clean_takes_away_what_a_terminal_obeys() -> None:
    assert clean("a\x1b[31mb\x1b[0mc\x1b]0;title\x07d\x1bce") == "abcde"
    assert clean("one\n\n two\tthree\x00\x07\u2028four") == "one two three four"
    assert clean("one\r\ntwo\x1b[2J", lines=True) == "one\ntwo"
    assert clean("\u202eabc\ud800") == "abc\ufffd"
    assert clean("quoted\u00e2\u0080\u009d and the rest of the text stays") == "quoted\u00e2 and the rest of the text stays"
    assert clean("👩\u200d💻 नमस्ते") == "👩\u200d💻 नमस्ते"
    assert clean(None) == ""


def test_values_in_words() -> None:
    assert [size(n) for n in (17, 1700, 91726912, 1.4e9, None)] == ["17 bytes", "1.7 kB", "91.7 MB", "1.4 GB", "n/a"]
    assert [duration(s) for s in (0.44, 88.2, 130, 7300, "x")] == ["0.4 s", "88 s", "2 min 10 s", "2 h 1 min", "n/a"]
    assert [percent(p) for p in (0.93, 0.934, 1.0, None)] == ["93 %", "93.4 %", "100 %", "n/a"]
    assert [number(v) for v in (3.5, 12, True, float("nan"), 10**400)] == ["3.500", "12", "n/a", "n/a", "n/a"]
    assert cell_len(shorten("長い文章" * 20, 21)) <= 21
    assert shorten("short", 5) == "short"


def test_json_card_survives_a_round_trip() -> None:
    assert report_html(json.loads(json.dumps(FULL))) == report_html(FULL)
