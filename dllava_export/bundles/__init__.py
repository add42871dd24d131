"""Bundles on disk: their layout, manifest, files and token embeddings."""
