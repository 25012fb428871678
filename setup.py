"""Packages, and the CUDA extension where nvcc is found; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "worldkv_kernels",
        "worldkv_kernels.cli",
        "worldkv_kernels.kernels",
        "worldkv_kernels.memory",
        "worldkv_kernels.models",
        "worldkv_kernels.ops",
        "worldkv_kernels.reference",
    ],
    package_dir={"worldkv_kernels": "worldkv_kernels", "worldkv_kernels.kernels": "kernels"},
    package_data={"worldkv_kernels": ["py.typed"], "worldkv_kernels.ops": ["proven.json"]},
)
