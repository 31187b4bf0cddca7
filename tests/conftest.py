"""Settings for every test."""

import os

# Cores are shared: one thread a library, as in the processes that work on assets.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
