"""KVCacheAttention: append to the cache and attend to it."""
