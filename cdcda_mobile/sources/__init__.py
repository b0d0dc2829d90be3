"""Where a user's history can come from: one module per kind of source, all yielding the same rows."""
