"""What all tests share."""

from __future__ import annotations

import torch

# The tensors here are tiny: more threads only get in one another's way.
torch.set_num_threads(1)
