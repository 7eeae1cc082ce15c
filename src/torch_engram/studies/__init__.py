"""Experiments with their controls, as code that anyone can run again."""

STUDIES = {
    "recipe": "Learning rates of the baselines, and how tables are trained.",
    "allocation": "Experts or tables, at equal total and active parameters.",
    "slots": "More rows at fixed compute, and other ways to use n-grams.",
}
"""Studies of pretraining that ship: the module of each, and a line about it."""
