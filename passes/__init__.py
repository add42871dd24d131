"""Graph passes, one per file; `README.md` beside them is their table."""
