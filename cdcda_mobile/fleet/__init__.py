"""Cohorts of users as Ray tasks: the ``driver`` hands them out, a ``worker`` does one, the ``view`` shows progress."""
