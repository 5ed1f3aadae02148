"""Files in and out: what the library, the scripts and the evaluator share (no torch, no TensorFlow)."""
