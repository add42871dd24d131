"""How answers are judged: a file for each metric, `table.py` for all of them."""
