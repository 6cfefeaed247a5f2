# SPDX-License-Identifier: Apache-2.0
"""The torch.library operators: schemas, fakes, gradients, FLOP formulas, and their PyTorch backend."""
