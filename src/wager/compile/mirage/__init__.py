"""Mirage: superoptimizes tensor programs over kernel, block and thread levels (arXiv 2405.05751)."""
