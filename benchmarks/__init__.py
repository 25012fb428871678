"""The benchmarks, installed for `worldkv bench`. They are scripts first and import each other by their bare names."""
