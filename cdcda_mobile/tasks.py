"""What the user is asked for: one row per task, after the LaMP benchmark (Salemi et al. 2023, arXiv 2304.11406)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdcda_export.errors import ConfigError, did_you_mean

Metric = Literal["text", "label", "rating"]


@dataclass(frozen=True)
class Task:
    """One kind of record.

    ``instruction`` becomes the user's turn of the chat, with ``{input}`` replaced; ``input_name`` and ``output_name`` are the
    words for the two sides in prompts to the teacher; ``labels`` is the closed answer set, empty for free text.
    """

    name: str
    lamp: str
    instruction: str
    input_name: str
    output_name: str
    metric: Metric
    labels: tuple[str, ...] = ()

    def prompt(self, text: str) -> str:
        """Return the user's turn for one input."""
        return self.instruction.replace("{input}", text)


_MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)
_NEWS_CATEGORIES = (
    "food & drink",
    "sports",
    "education",
    "parents",
    "religion",
    "travel",
    "business",
    "crime",
    "science & technology",
    "culture & arts",
    "entertainment",
    "politics",
    "women",
    "style & beauty",
    "healthy living",
)

_ROWS = (
    Task("citation", "LaMP_1", "{input}", "question", "reference", "label", ("[1]", "[2]")),
    Task(
        "news_category",
        "LaMP_2N",
        "Name the category of this article, one of: " + ", ".join(_NEWS_CATEGORIES) + ".\n\n{input}",
        "article",
        "category",
        "label",
        _NEWS_CATEGORIES,
    ),
    Task(
        "movie_tag",
        "LaMP_2M",
        "Name the tag of this movie, one of: " + ", ".join(_MOVIE_TAGS) + ".\n\n{input}",
        "movie description",
        "tag",
        "label",
        _MOVIE_TAGS,
    ),
    Task("rating", "LaMP_3", "Rate this review from 1 to 5:\n\n{input}", "review", "score", "rating", ("1", "2", "3", "4", "5")),
    Task("headline", "LaMP_4", "Write a headline for this text:\n\n{input}", "text", "headline", "text"),
    Task("paper_title", "LaMP_5", "Write a title for this abstract:\n\n{input}", "abstract", "title", "text"),
    Task("subject", "LaMP_6", "Write a subject line for this email:\n\n{input}", "email", "subject line", "text"),
    Task("tweet", "LaMP_7", "Paraphrase this tweet:\n\n{input}", "tweet", "paraphrase", "text"),
    # What LaMP-7's histories without pairs become (see sources/lamp.py).
    Task("tweet_completion", "LaMP_7", "Complete this tweet:\n\n{input}", "beginning of a tweet", "tweet", "text"),
    Task("commit", "", "Write a commit subject for a change of these files:\n\n{input}", "changed files", "commit subject", "text"),
    Task("reply", "", "{input}", "message", "reply", "text"),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is no such task.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"There is no task '{name}'.{did_you_mean(name, TASKS)}") from None
