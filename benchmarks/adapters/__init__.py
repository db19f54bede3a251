"""The smallest adapters that let other libraries compute the kernel of region gradients, for ``peers.py``."""
