"""Pretrained models on sapper's kernels. Ordinary user code of the language."""
