"""Settings that every test runs under."""

import os

# Tests run beside each other on small machines: one thread each, and TensorFlow without its banner.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
