"""Answer prompts: slots over a backend's caches, sessions, generation, conversations."""
