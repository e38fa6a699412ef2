"""What scripts and tests share: checkpoints to make, llama.cpp's programs to compare with, what is measured and how.

A script finds this package beside itself, the tests by `pythonpath` in pyproject.toml. It is never installed.
"""
