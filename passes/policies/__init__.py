"""Policies, one per file: what scores image rows, and what decides about generated tokens."""
