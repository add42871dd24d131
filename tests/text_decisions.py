"""Nodes by which each policy decides about generated tokens, as text for `helpers`."""

from __future__ import annotations

DECISIONS = {
    "predictor": """
    scores_text, decision = ai.dllava.PredictorHead <epsilon = 1e-5> (last_h0,
        "output_text_predictor.output_mlp.0.weight", "output_text_predictor.output_mlp.0.bias",
        "output_text_predictor.output_mlp.1.weight", "output_text_predictor.output_mlp.1.bias",
        "output_text_predictor.output_mlp.3.weight", "output_text_predictor.output_mlp.3.bias",
        "output_text_predictor.output_mlp.5.weight", "output_text_predictor.output_mlp.5.bias",
        "output_text_predictor.output_mlp.7.weight", "output_text_predictor.output_mlp.7.bias")
""",
    "random": """
    salted = Add (last_position, salt)
    multiplied = Mul (salted, factor)
    shifted = Add (multiplied, shift)
    reduced = Mod (shifted, prime)
    quadratic = Mul (reduced, salted)
    mixed = Add (quadratic, offset)
    hashed = Mod (mixed, prime)
    number = Cast <to = 1> (hashed)
    drawn = Div (number, prime_float)
    scores_text = Sub (rate, drawn)
    decision = Greater (scores_text, none)
""",
    "uniform": """
    following = Add (last_position, one)
    up_to_product = Mul (following, rate_fixed)
    up_to = Div (up_to_product, whole)
    before_product = Mul (last_position, rate_fixed)
    before = Div (before_product, whole)
    difference = Sub (up_to, before)
    scores_text = Cast <to = 1> (difference)
    decision = Greater (scores_text, none)
""",
}
CONSTANTS = """, int64[1] end = {9223372036854775807}, int64 salt = {1048577},
    int64 factor = {48271}, int64 shift = {1103515245}, int64 offset = {12345},
    int64 prime = {2147483647}, float prime_float = {2147483647.0}, float rate = {0.25},
    float none = {0}, int64 rate_fixed = {262144}, int64 whole = {1048576}"""
