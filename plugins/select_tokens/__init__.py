"""SelectTokens: indices of the rows that go on."""
