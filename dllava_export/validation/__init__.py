"""Compare what two runtimes or two forms of a model compute."""
