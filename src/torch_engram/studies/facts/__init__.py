"""Facts taught to a pretrained model, by a memory beside it, by LoRA and by full fine-tuning.

What is asked afterwards: the facts in trained wordings and in held-out ones, and what the model knew before.
"""
