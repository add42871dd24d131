"""Make bundles: from checkpoints, and from dense decoders of any exporter."""
