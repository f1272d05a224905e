"""The arithmetic of training, for train.py: tensors in, tensors out; no files of a run, no HTTP."""
