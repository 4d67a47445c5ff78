"""What is published of a run, and how: the model card, the push, code for people without this package.

It reads the files of a training run, and has nothing of the code that made them.
"""
