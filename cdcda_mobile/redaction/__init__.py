"""What of a user's records is hidden from the teacher, how it comes back, and how far that goes: see ``docs/privacy.md``."""

from __future__ import annotations

from cdcda_mobile.redaction.library import name_finder
from cdcda_mobile.redaction.redactor import Redactor

__all__ = ["Redactor", "name_finder"]
