"""Experiments with their controls, as code that anyone can run again."""

STUDIES = {"recipe": "Learning rates of the baselines, and how tables are trained."}
"""Studies of pretraining that ship: the module of each, and a line about it."""
