"""Learning from the line: what the edge was unsure of goes up, a teacher judges it, and a small update comes down.

After CD-CCA (Wang et al., CVPR 2024): uncertainty-guided sampling, adapter-based distillation, compressed updates.
"""
