"""The trainer's own objects: tensors of model and optimizers, generators, other state, the world; read and written in place."""
