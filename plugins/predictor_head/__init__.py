"""PredictorHead: keep or drop a row."""
