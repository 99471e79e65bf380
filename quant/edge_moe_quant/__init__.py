"""The quantizer: weights to 4- and 8-bit blocks."""
