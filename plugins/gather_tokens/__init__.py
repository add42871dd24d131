"""GatherTokens: rows of a tensor in one launch."""
