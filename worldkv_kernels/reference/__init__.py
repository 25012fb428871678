"""Each op in plain PyTorch: what a kernel is compared with, and what runs where no kernel can."""
