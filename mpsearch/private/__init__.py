"""What is not public in the libraries that mpsearch stands on: one small module a library, and nowhere else.

Each entry says what it is for; `tests/test_private.py` says what breaks where a new version no longer has it. What
torch.compile needs of torch's inductor is in `mpsearch.compiler`, which does without where it is missing.
"""
