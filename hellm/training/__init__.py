"""Training loops. Each stage reads a data set and leaves a run directory (see `run_directory`).

The stages live in modules of their own, imported when used: `hellm.training.pretrain` is stage 1.
"""
