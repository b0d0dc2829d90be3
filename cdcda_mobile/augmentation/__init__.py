"""Synthetic records for one user: what the teacher is asked, what becomes of its answers, and which of them are kept."""
