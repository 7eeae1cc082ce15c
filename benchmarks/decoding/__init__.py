"""Decoding a whole model of random weights: what a memory costs it is measured by the scripts beside this folder."""
