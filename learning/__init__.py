"""The side of training that needs tensors, for train.py: devices, optimizers, the model to start with; no HTTP."""
