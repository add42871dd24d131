"""Checkpoints on disk: their files, and where each tensor lies. Nothing model specific."""
