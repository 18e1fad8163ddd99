"""The memory of a training run before any weight is read: rehearsed on tensors without content, then added up."""
