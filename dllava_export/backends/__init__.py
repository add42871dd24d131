"""What runs a bundle's graphs: the contract, cache plans, the registry, one folder per runtime."""
