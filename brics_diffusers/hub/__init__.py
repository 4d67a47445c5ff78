"""What is published of a run, and how: the model card, the push, code for people without this package."""
