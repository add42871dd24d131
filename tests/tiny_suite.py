"""A benchmark suite that takes seconds: a decoder of some kilobytes, short prompts."""

from __future__ import annotations

from dllava_export.benchmark.geometries import SuiteCase, SuiteGeometry, SuiteSettings

TINY = SuiteGeometry(
    name="tiny",
    title="A tiny decoder",
    num_layers=3,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=320,
    ties_embeddings=True,
    predictor_width=16,
    predictor_heads=2,
    cases=(SuiteCase(1, 2, 2), SuiteCase(2, 1, 1)),
    num_starts=1,
)
SETTINGS = SuiteSettings(
    geometries=(TINY,),
    image_tokens_per_side=4,
    num_text_tokens=8,
    decode_lengths=(0, 200),
    decode_steps=2,
    num_threads=1,
    kv_length=200,
)
