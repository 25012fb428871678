"""Triton kernels of worldkv_kernels, one op a file. Each file needs torch and triton alone."""
