"""Files in and out, for the library, the scripts and the evaluator (no torch, no TensorFlow)."""
