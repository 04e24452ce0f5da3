"""Rules for (I - Jᵀ) z = g: one a file, over the frame of ``rule.py``."""
