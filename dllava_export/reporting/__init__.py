"""How things are told: tables, sizes, progress, what a command took, files written whole."""
