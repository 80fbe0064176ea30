"""A whole model as files: programs and weights ahead of time, for C programs and as an executable of its own."""
