"""DeepSeek V2, V2-Lite, V3 and R1 (V3's architecture) on sapper's kernels."""
