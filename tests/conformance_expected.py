"""Write benchmarks/conformance/expected.npz: what the kernels of benchmarks/conformance give on cuda_on_host.

    python tests/conformance_expected.py

To be done where a kernel there has changed. test_conformance.py derives the same from what the facts say.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

import cuda_on_host
import numpy as np

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def main() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    import conformance
    import conformance_run

    with tempfile.TemporaryDirectory() as folder:
        library = conformance_run.load(cuda_on_host.build(BENCHMARKS / "conformance", Path(folder)))
        library.cuda_on_host_seed(ctypes.c_uint64(0))
        names = conformance_run.names(library)
        words = {name: np.frombuffer(conformance_run.run(library, name), "<u4") for name in names}
    conformance.write_expected(words)


if __name__ == "__main__":
    main()
