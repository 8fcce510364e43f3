"""The rows of the feature registry, in the order of the survey's taxonomy (arXiv 2312.15234), then what servers are expected to have.

A row with an implementation is a claim that tests check. A row without one says why the engine does not have it.
"""
