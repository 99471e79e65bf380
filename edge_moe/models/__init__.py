"""One file per architecture, each the forward pass from top to bottom."""
