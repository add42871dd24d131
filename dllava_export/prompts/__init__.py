"""From text, token ids and pictures to the rows that a decoder is fed."""
